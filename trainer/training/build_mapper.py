"""The mapper that a stage trains: a new one, or an earlier run's."""

from dataclasses import replace
from pathlib import Path

from minigpt5_core.conditioning import SPACES, Space, check_space
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.mapper import (
    Mapper,
    StandardisedMapper,
    build_mapper,
    compact_config,
    connector_config,
    reference_config,
)
from minigpt5_core.pipeline import space_of
from minigpt5_core.weights import load_mapper

from ..diffusion import Targets
from .config import StageRecipe


def new_mapper(recipe: StageRecipe, llm: FrozenLLM, targets: Targets) -> Mapper:
    """An untrained mapper of the recipe's kind; our own kinds answer in the text encoder's scale from the start."""
    if recipe.space not in SPACES:
        raise BadInputError(f"Unknown space {recipe.space!r}. Known: {', '.join(SPACES)}.")
    space = recipe_space(recipe)
    check_space(space, space_of(targets.backbone.pipeline, space))
    configs = {"compact": compact_config, "connector": connector_config, "reference": reference_config}
    if recipe.mapper not in configs:
        raise BadInputError(f"Unknown mapper {recipe.mapper!r}. Known: {', '.join(configs)}.")
    mapper = build_mapper(configs[recipe.mapper](space, llm.width, recipe.vokens))
    if recipe.tokens != len(targets.mean) and recipe.caption_weight:
        raise BadInputError(
            f"tokens is {recipe.tokens}, but the text encoder gives {len(targets.mean)}: caption alignment compares "
            f"them one by one. Set tokens={len(targets.mean)}, or caption_weight=0."
        )
    scale_to(mapper, targets)
    return mapper


def scale_to(mapper: Mapper, targets: Targets) -> None:
    """Lets a mapper of our own kinds answer in the text encoder's scale; another, or one of other tokens, stays."""
    if isinstance(mapper, StandardisedMapper) and mapper.config.tokens == len(targets.mean):
        mapper.target_mean.copy_(targets.mean)
        mapper.target_std.copy_(targets.deviation)


def recipe_space(recipe: StageRecipe) -> Space:
    """The space the recipe names, with its own number of tokens."""
    return replace(SPACES[recipe.space], tokens=recipe.tokens)


def earlier_mapper(recipe: StageRecipe, llm: FrozenLLM, start: Path) -> Mapper:
    """An earlier run's mapper; BadInputError when it is for another space, LLM width or number of vokens or tokens."""
    mapper, header = load_mapper(start / "mapper.safetensors")
    found = (header.space.name, header.llm_width, mapper.config.vokens, mapper.config.tokens)
    expected = (recipe.space, llm.width, recipe.vokens, recipe.tokens)
    if found != expected:
        raise BadInputError(
            f"--from {start}: its mapper is for space, LLM width, vokens and tokens {found}; the recipe says "
            f"{expected}. Give a run of the same settings."
        )
    return mapper.train()
