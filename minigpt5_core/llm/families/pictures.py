"""Pictures as vision towers take them, by the settings in a model's image processor configuration.

With torch alone: transformers' own image processors need torchvision, or are not in every version. Resampling is
torch's antialiased bicubic, within a rounding of Pillow's.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import BadInputError
from ...texts import read_json

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


def read_processor(folder: Path) -> dict[str, Any]:
    """The image processor's configuration, from the newer of the two files that may hold it."""
    if (folder / PROCESSOR).is_file():
        config = read_json(folder / PROCESSOR)
        if "image_processor" in config:
            return config["image_processor"]
    if not (folder / PREPROCESSOR).is_file():
        raise BadInputError(
            f"{folder} has no {PREPROCESSOR}, which says how pictures are scaled for its LLM. Copy it from where "
            "the model came from."
        )
    return read_json(folder / PREPROCESSOR)


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) in [0, 1] -> (3, height, width), stretched."""
    image = picture.movedim(-1, 0).float()
    if image.shape[-2:] != (height, width):
        image = functional.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    return image.clamp(0, 1)


def normalised(image: Tensor, processor: dict[str, Any]) -> Tensor:
    """(3, H, W) in [0, 1], standardised with the processor's mean and standard deviation."""
    mean, std = (torch.tensor(processor[name]).to(image) for name in ("image_mean", "image_std"))
    return (image - mean[:, None, None]) / std[:, None, None]


def side_of(size: Any) -> int:
    """The side of a square that a processor's size names in one of several ways."""
    return size if isinstance(size, int) else min(size.values())
