"""Pictures as the trainer handles them: squares, tensors, latents, contact sheets."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, resampled to `side` pixels."""
    return (
        image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    )


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(vae: Any, pictures: list[Image.Image]) -> Tensor:
    """Scaled latents (B, C, h, w) of RGB pictures; of an AutoencoderKL's posterior, the mode."""
    encoded = vae.encode(to_tensor(pictures).to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (latents.float() - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] as RGB pictures."""
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(item) for item in array]


def grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, with a 2-pixel gap."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + 2), index // columns * (height + 2)))
    return sheet
