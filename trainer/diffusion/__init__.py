"""The frozen text-to-image model as training needs it: its text encoders' answers, and how wrong it is about pictures.

A class a family, named in minigpt5_core's table of diffusion families and found by the folder's diffusers pipeline.
"""

from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from minigpt5_core.conditioning.diffusion_families import DIFFUSION_FAMILIES, DiffusionFamily, family_of
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError

from ..data.source import Features
from .base import FrozenDiffusion
from .picture_size import check_picture_size
from .text_encoders import lacks_a_denoiser, text_pipeline
from .text_targets import TextTargets

__all__ = [
    "Features",
    "FrozenDiffusion",
    "TextTargets",
    "check_picture_size",
    "lacks_a_denoiser",
    "load_frozen_diffusion",
    "load_text_encoders",
    "training_class",
]


def training_class(family: DiffusionFamily) -> type[FrozenDiffusion]:
    """The class of this package that trains mappers for a family."""
    module, name = family.training.split(".")
    return getattr(import_module(f".{module}", __package__), name)


def load_frozen_diffusion(folder: Path, precision: str = "float32", picture_size: int = 0) -> FrozenDiffusion:
    """The model of a diffusers folder, frozen, in "float32" or "bf16", for pictures of a size (0: its own).

    BadInputError when there is none, or one of another kind, or it cannot take pictures of that size.
    """
    pipeline = load_diffusion(folder, precision=precision)
    family = family_of(pipeline)
    if family is None:
        known = dict.fromkeys(one.diffusers.pipeline for one in DIFFUSION_FAMILIES.values())
        raise BadInputError(
            f"{folder} holds a {type(pipeline).__name__}; mappers are trained for "
            f"{', '.join(known)}. Set diffusion to one of these."
        )
    _freeze(pipeline)
    pipeline.vae.enable_slicing()  # a batch of large pictures at once would need more than training does
    return training_class(family)(pipeline, picture_size)


def load_text_encoders(given: Path, precision: str = "float32", tokenizer: str = "") -> FrozenDiffusion:
    """The text encoders alone of a diffusers folder or a checkpoint file, frozen; a model that does not draw.

    `tokenizer` is the folder of a checkpoint file's CLIP tokenizer (empty: looked for). BadInputError as above.
    """
    family, pipeline = text_pipeline(given, precision, tokenizer)
    _freeze(pipeline)
    return training_class(family)(pipeline)


def _freeze(pipeline: DiffusionPipeline) -> None:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
