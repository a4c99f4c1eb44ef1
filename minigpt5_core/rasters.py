"""The formats a picture may be in: plain pixels, read by Pillow itself.

Left to guess, Pillow takes PostScript under any name for a picture and starts Ghostscript, which runs what is in it.
"""

from pathlib import Path
from typing import IO

from PIL import Image

# JPEG stands for phones' MPO too, and BMP for what the clipboard holds of it.
RASTERS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")


def known_rasters() -> tuple[str, ...]:
    """Those of `RASTERS` that the installed Pillow reads; AVIF came later, WebP may have been left out."""
    Image.init()
    return tuple(name for name in RASTERS if name in Image.OPEN)


def open_picture(source: Path | str | IO[bytes]) -> Image.Image:
    """The picture in a file, not decoded yet; whoever opens it closes it.

    Raises as Image.open does: OSError (UnidentifiedImageError for any other format), SyntaxError, ValueError, and
    DecompressionBombError.
    """
    return Image.open(source, formats=known_rasters())
