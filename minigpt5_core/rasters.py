"""Pictures from elsewhere: the formats that are read, and their pixels as a viewer shows them.

Left to guess, Pillow takes PostScript under any name for a picture and starts Ghostscript, which runs what is in it.
"""

import os
import struct
from pathlib import Path
from typing import IO

from PIL import Image, ImageCms, ImageOps

# JPEG stands for phones' MPO too, and BMP for what the clipboard holds of it.
RASTERS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what reading a picture raises
# what Pillow's plugins let through for a damaged file besides
STUMBLES = (struct.error, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, EOFError)


def known_rasters() -> tuple[str, ...]:
    """Those of `RASTERS` that the installed Pillow reads; AVIF came later, WebP may have been left out."""
    Image.init()
    return tuple(name for name in RASTERS if name in Image.OPEN)


def open_picture(source: Path | str | IO[bytes]) -> Image.Image:
    """The picture in a file, not decoded yet; whoever opens it closes it. One of `UNREADABLE` for anything else.

    A pipe is refused: opening it would wait for somebody to write.
    """
    if isinstance(source, (str, os.PathLike)) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("it is no file")
    try:
        return Image.open(source, formats=known_rasters())
    except STUMBLES as error:
        raise OSError(f"it is damaged ({error})") from error


def as_seen(picture: Image.Image) -> Image.Image:
    """The picture in RGB as a viewer shows it: upright, white behind what is transparent, 8 bits of what is deeper.

    Decodes it; one of `UNREADABLE` where that fails.
    """
    try:
        plain = _eight_bits(ImageOps.exif_transpose(picture))
        if not plain.has_transparency_data:
            return plain.convert("RGB")
        seen = Image.new("RGBA", plain.size, "white")
        seen.alpha_composite(plain.convert("RGBA"))
    except STUMBLES as error:
        raise OSError(f"it is damaged ({error})") from error
    return seen.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A mode that Pillow converts to RGB rightly: it would clip deep greys, and refuse Lab colours and some alphas."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _grey(picture)
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        changed = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
        assert changed is not None  # it is only where the picture is changed in place
        return changed
    return picture.convert("LA") if picture.mode == "La" else picture


def _grey(picture: Image.Image) -> Image.Image:
    """Grey values of 0 to 65535, or as fractions of 0 to 1, in 8 bits."""
    import numpy as np  # here: a command's help does without

    values = np.asarray(picture)
    white = 1.0 if values.dtype.kind == "f" else 65535.0
    if not (values.min() >= 0 and values.max() <= white):  # NaN is neither
        raise ValueError(
            f"its grey values reach from {values.min():g} to {values.max():g}, expected 0 to {white:g}; save it with 8 "
            "bits a channel"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
