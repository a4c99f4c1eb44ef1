"""Pictures as tensors: (H, W, 3) in [0, 1], and the squares that an encoder takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..rasters import as_seen


def picture_tensor(picture: Image.Image) -> Tensor:
    """The picture as (H, W, 3) in [0, 1], as a viewer shows it."""
    return torch.from_numpy(np.asarray(as_seen(picture), dtype=np.float32) / 255)


def to_square(pictures: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, size, size) in [-1, 1]: the middle square, resampled."""
    images = middle_square(pictures).movedim(-1, 1).float()
    if images.shape[-1] != size:
        images = functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return images.clamp(0, 1) * 2 - 1


def middle_square(pictures: Tensor) -> Tensor:
    """(..., H, W, 3) -> (..., side, side, 3), the side being the shorter of the two."""
    *_, height, width, _ = pictures.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[..., top : top + side, left : left + side, :]


def white_square(picture: Tensor) -> Tensor:
    """(H, W, 3) in the middle of a white (side, side, 3), as the published demo and its training targets have it."""
    height, width, _ = picture.shape
    side = max(height, width)
    square = picture.new_ones(side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square
