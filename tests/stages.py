"""The stages as the command line runs them: on the recipe's data set, or on the storybook's world.

With one difference: few captions are measured before training, which takes most of a short run. A run that is compared
with the command line's own measures all of them: `open_source=cli.open_source(recipe)`.
"""

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.llm import FrozenLLM
from trainer import cli
from trainer.common.recipe import flat_keys
from trainer.data.source import DataSource, Features, OpenSource
from trainer.diffusion import FrozenDiffusion, load_frozen_diffusion
from trainer.stages import align, finetune, mapper
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe
from trainer.stages.mapper import MapperRecipe
from trainer.training.config import StageRecipe
from trainer.training.setup import LoadDiffusion


def train_align(
    recipe: AlignRecipe, out: Path, start: Path | None = None, resume: bool = False, **parts: Any
) -> tuple[FrozenLLM, Mapper]:
    """`parts`, such as `load_diffusion` or another `open_source`, go to the stage."""
    return align.train_align(recipe, out, **with_source(recipe, parts), start_from=start, resume=resume)


def train_finetune(
    recipe: FinetuneRecipe, out: Path, start: Path | None = None, resume: bool = False, **parts: Any
) -> tuple[FrozenLLM, Mapper]:
    """`parts`, such as `load_diffusion` or another `open_source`, go to the stage."""
    return finetune.train_finetune(recipe, out, **with_source(recipe, parts), start_from=start, resume=resume)


def train_mapper(
    recipe: MapperRecipe, out: Path, start: Path | None, resume: bool = False, **parts: Any
) -> Mapper:
    """`parts`, such as `load_diffusion` or another `open_source`, go to the stage."""
    return mapper.train_mapper(recipe, out, **with_source(recipe, parts), start_from=start, resume=resume)


def with_source(recipe: StageRecipe, parts: dict[str, Any]) -> dict[str, Any]:
    return {"open_source": few_captions(recipe)} | parts


def few_captions(recipe: StageRecipe, most: int = 16) -> OpenSource:
    """The recipe's source, of whose captions few are measured before training."""
    plain = cli.open_source(recipe)

    def open_source(llm: FrozenLLM, features: Features | None) -> DataSource:
        source: Any = plain(llm, features)
        captions = source.captions
        source.captions = lambda count: captions(min(count, most))
        return source

    return open_source


def stopping_source(recipe: StageRecipe, after: int) -> OpenSource:
    """The recipe's source, which ends the run, as Ctrl-C does that cannot wait, when it is asked once more."""
    plain = few_captions(recipe)

    def open_source(llm: FrozenLLM, features: Features | None) -> DataSource:
        source: Any = plain(llm, features)
        source.sample = stopping(source.sample, after)
        return source

    return open_source


def stopping_diffusion(after: int) -> LoadDiffusion:
    """Loads a diffusion model that does the same after so many losses, one a step where there is one process."""

    def load(*given: Any) -> FrozenDiffusion:
        diffusion: Any = load_frozen_diffusion(*given)
        diffusion.loss = stopping(diffusion.loss, after)
        return diffusion

    return load


def stopping(plain: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The same function, which can be called so many times."""
    calls = iter(range(after))

    def call(*given: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(*given)

    return call


def as_settings(recipe: StageRecipe) -> list[str]:
    """What of a recipe is not the default, as the command line takes it."""
    plain, given = type(recipe)(), []
    for keys in dict.fromkeys(flat_keys(type(recipe)).values()):  # an old name is there beside the new one
        value = reduce(getattr, keys, recipe)
        if value != reduce(getattr, keys, plain):
            given.append(f"--set={keys[-1]}={json.dumps(value)}")
    return given


def values_of(recipe: StageRecipe, *names: str) -> dict[str, Any]:
    """Values of a recipe by their flat names, to make another kind of recipe with."""
    known = flat_keys(type(recipe))
    return {name: reduce(getattr, known[name], recipe) for name in names}
