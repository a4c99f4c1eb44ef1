"""The frozen text-to-image model as training needs it: its text encoders' answers, and how wrong it is about pictures.

A class a family, found by the folder's diffusers pipeline: SD 1.5 and SD 2.1 (the storybook's model is of this kind),
SDXL, SD3 and SD3.5, Flux.
"""

from pathlib import Path

import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from minigpt5_core.errors import BadInputError
from minigpt5_core.pipeline import load_diffusion

from ..data.source import Features
from .base import FrozenDiffusion
from .flow import Flux, Sd3
from .picture_size import check_picture_size
from .text_targets import TextTargets
from .unet import Sd, Sdxl

__all__ = [
    "FAMILIES",
    "FrozenDiffusion",
    "Features",
    "TextTargets",
    "check_picture_size",
    "load_frozen_diffusion",
]

FAMILIES: dict[type, type[FrozenDiffusion]] = {
    StableDiffusionPipeline: Sd,
    StableDiffusionXLPipeline: Sdxl,
    StableDiffusion3Pipeline: Sd3,
    FluxPipeline: Flux,
}


def load_frozen_diffusion(folder: Path, precision: str = "float32", picture_size: int = 0) -> FrozenDiffusion:
    """The model of a diffusers folder, frozen, in "float32" or "bf16", for pictures of a size (0: its own).

    BadInputError when there is none, or one of another kind, or it cannot take pictures of that size.
    """
    pipeline = load_diffusion(folder, precision=precision)
    family = next((FAMILIES[kind] for kind in FAMILIES if isinstance(pipeline, kind)), None)
    if family is None:
        raise BadInputError(
            f"{folder} holds a {type(pipeline).__name__}; mappers are trained for "
            f"{', '.join(kind.__name__ for kind in FAMILIES)}. Set diffusion to one of these."
        )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipeline.vae.enable_slicing()  # a batch of large pictures at once would need more than training does
    return family(pipeline, picture_size)
