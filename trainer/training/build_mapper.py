"""The mapper that a stage trains: a new one, or an earlier run's."""

from dataclasses import replace
from pathlib import Path

from minigpt5_core.conditioning import SPACES, Space, check_space
from minigpt5_core.conditioning.mapper import (
    Mapper,
    StandardisedMapper,
    build_mapper,
    compact_config,
    connector_config,
    reference_config,
)
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM

from ..diffusion import TextTargets
from .config import ModelConfig, StageRecipe

CONFIGS = {"compact": compact_config, "connector": connector_config, "reference": reference_config}


def new_mapper(recipe: StageRecipe, llm: FrozenLLM, targets: TextTargets) -> Mapper:
    """An untrained mapper of the recipe's kind; our own kinds answer in the text encoder's scale from the start.

    BadInputError for an unknown space or kind, and for another number of tokens than the text encoder's.
    """
    model = recipe.model
    if model.space not in SPACES:
        raise BadInputError(f"Unknown space {model.space!r}. Known: {', '.join(SPACES)}.")
    if model.mapper not in CONFIGS:
        raise BadInputError(f"Unknown mapper {model.mapper!r}. Known: {', '.join(CONFIGS)}.")
    space = mapper_space(model)
    check_space(space, targets.space(space))
    mapper = build_mapper(CONFIGS[model.mapper](space, llm.width, model.vokens))
    if model.tokens != len(targets.mean) and recipe.loss.caption_weight:
        raise BadInputError(
            f"tokens is {model.tokens}, but the text encoder gives {len(targets.mean)}: caption alignment compares "
            f"them one by one. Set tokens={len(targets.mean)}, or caption_weight=0."
        )
    scale_to(mapper, targets)
    return mapper


def scale_to(mapper: Mapper, targets: TextTargets) -> None:
    """Lets a mapper of our own kinds answer in the text encoder's scale; another, or one of other tokens, stays."""
    if isinstance(mapper, StandardisedMapper) and mapper.config.tokens == len(targets.mean):
        mapper.target_mean.copy_(targets.mean)
        mapper.target_std.copy_(targets.std)


def mapper_space(model: ModelConfig) -> Space:
    """The space the recipe names, with its own number of tokens."""
    return replace(SPACES[model.space], tokens=model.tokens)


def earlier_mapper(
    recipe: StageRecipe, llm: FrozenLLM, start: Path, targets: TextTargets | None = None
) -> Mapper:
    """An earlier run's mapper; BadInputError when it is for another space, LLM width or number of vokens or tokens, or
    for another diffusion model than the one of the `targets`."""
    mapper, header = load_mapper(start / "mapper.safetensors")
    found = (header.space.name, header.llm_width, mapper.config.vokens, mapper.config.tokens)
    expected = (recipe.model.space, llm.width, recipe.model.vokens, recipe.model.tokens)
    if found != expected:
        raise BadInputError(
            f"--from {start}: its mapper is for space, LLM width, vokens and tokens {found}; the recipe says "
            f"{expected}. Give a run of the same settings."
        )
    if targets is not None:
        check_space(header.space, targets.space(header.space))
    return mapper.train()
