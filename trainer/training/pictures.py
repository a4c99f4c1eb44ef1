"""Whether a stage has pictures to learn from. Without, captions teach the mapper, and of the diffusion model its text
encoders and tokenizers alone are loaded.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from minigpt5_core.errors import BadInputError

from ..data.formats import holds_pictures
from ..diffusion import FrozenDiffusion, lacks_a_denoiser, load_text_encoders
from .config import DataConfig, StageRecipe, Unasked
from .setup import LoadDiffusion

Recipe = TypeVar("Recipe", bound=StageRecipe)


def as_pictures_allow(recipe: Recipe, load: LoadDiffusion) -> tuple[Recipe, LoadDiffusion]:
    """The recipe, and how its diffusion model is loaded: without pictures, without the diffusion loss and in parts.

    BadInputError for a recipe that asks for the diffusion loss all the same, or has no other loss for its mapper.
    """
    lacking = _lacking(recipe)
    if not lacking:
        return recipe, load
    loss = recipe.loss
    if loss.image_weight and loss.image_from < 1 and not isinstance(loss.image_weight, Unasked):
        raise BadInputError(
            f"{lacking}, but image_weight={loss.image_weight:g} asks for the diffusion loss, which is about pictures. "
            "Set image_weight=0 (the captions teach the mapper), or give pictures and a whole diffusers folder."
        )
    if not loss.caption_weight:
        raise BadInputError(
            f"{lacking}, so there is no diffusion loss, and caption_weight is 0: nothing would teach the mapper. Set "
            "caption_weight above 0."
        )
    print(
        f"{lacking}: trained on captions alone. Of the diffusion model text encoders and tokenizers are loaded; there "
        "is no diffusion loss, and there are no previews."
    )
    return replace(recipe, loss=replace(loss, image_weight=0.0)), load_without_pictures(recipe)


def load_without_pictures(recipe: StageRecipe) -> LoadDiffusion:
    """Loads the recipe's text encoders alone."""

    def load(given: Path, precision: str, size: int) -> FrozenDiffusion:
        return load_text_encoders(given, precision, recipe.model.tokenizer)

    return load


def _lacking(recipe: StageRecipe) -> str:
    """Where there are no pictures to learn from, in words; empty where there are some."""
    given = Path(recipe.model.diffusion)
    if lacks_a_denoiser(given):
        return f"{given} has no denoiser or VAE to learn from"
    return "" if _has_pictures(recipe.data) else f"{Path(recipe.data.path)} holds no pictures"


def _has_pictures(data: DataConfig) -> bool:
    return not data.path or holds_pictures(Path(data.path), data.format)
