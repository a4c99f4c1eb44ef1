"""The mapper by itself, on the voken states of an LLM and an adapter that stay as they are.

    python -m trainer mapper --from runs/finetune --out runs/mapper

The LLM is run once over every example, so a step costs a hundredth of finetune's: for another diffusion model, another
shape of mapper, or a text encoder that has changed.
"""

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_adapter, load_vision

from ..data.source import OpenSource, PictureTarget, Shard, new_seed
from ..diffusion import load_frozen_diffusion
from ..llm.sequences import story_losses, story_sequence
from ..training.batchers import split
from ..training.build_mapper import scale_to
from ..training.checkpoint import Run, start_accelerator
from ..training.config import DataConfig, ModelConfig, StageRecipe
from ..training.loop import Batch, Losses, TrainableModules, TrainLoop, train
from ..training.pictures import as_pictures_allow
from ..training.setup import LoadDiffusion, Setup, set_up, step_rng

READ_AT_ONCE = 4  # sequences in one forward of the LLM


@dataclass(frozen=True)
class MapperModel(ModelConfig):
    """`fresh` begins with a new mapper instead of the earlier run's. With an `image_adapter` the LLM sees."""

    fresh: bool = False
    image_adapter: str = ""


@dataclass(frozen=True)
class MapperData(DataConfig):
    """How many `stories` (examples, of a data set) the LLM is run over; of the storybook's world `captions` as well."""

    stories: int = 300
    captions: int = 300
    shown_share: float = 0.3


@dataclass(frozen=True)
class MapperRecipe(StageRecipe):
    """Settings of a mapper by itself. `batch` counts pictures."""

    stage: ClassVar[str] = "mapper"

    model: MapperModel = MapperModel()
    data: MapperData = field(default_factory=MapperData)

    def __post_init__(self) -> None:
        for name, table in (("gradient_checkpointing", self.optim), ("shard_llm", self.model)):
            if getattr(table, name):
                raise BadInputError(
                    f"{name} is set, but a mapper by itself is trained on states that are computed once. Leave it out."
                )
        loss = self.loss
        if not loss.caption_weight and not (loss.image_weight and loss.image_from == 0):
            raise BadInputError(
                f"caption_weight is 0, image_weight {loss.image_weight:g} and image_from {loss.image_from:g}: the "
                "first steps would have no loss. Set image_weight=1 and image_from=0, or caption_weight above 0."
            )


@dataclass(frozen=True)
class VokenStates:
    """Voken states (N, V, L) in half precision, and what each picture should show."""

    states: Tensor
    targets: list[PictureTarget]


@torch.no_grad()
def precompute_voken_states(setup: Setup) -> VokenStates:
    """Runs the LLM over the source's examples, once; BadInputError when none of them asks for a picture."""
    recipe = setup.recipe
    assert isinstance(recipe, MapperRecipe)
    rng = random.Random(f"mapper/{recipe.run.seed}")
    examples = [one for some in setup.source.sample(recipe.data.stories, rng).values() for one in some]
    targets = [target for one in examples for target in one.targets]
    if not targets:
        raise BadInputError(
            f"None of {recipe.data.stories} examples of {setup.source.name} asks for a picture, and a mapper learns "
            "from these alone. Set stories higher, or tasks that draw: caption, story, picture_from_text."
        )
    sequences = [story_sequence(setup.llm, one.turns) for one in examples]
    parts = [sequences[first : first + READ_AT_ONCE] for first in range(0, len(sequences), READ_AT_ONCE)]
    read = tqdm(parts, desc="voken states", mininterval=5)
    return VokenStates(torch.cat([story_losses(setup.llm, part)[0].half() for part in read]), targets)


class StateBatcher:
    """Pictures of precomputed voken states, drawn at random."""

    def __init__(self, setup: Setup, known: VokenStates) -> None:
        self.setup, self.known = setup, known

    def batches(self, step: int, shard: Shard) -> list[Batch]:
        """A process's share of a step, in as many parts as the recipe accumulates."""
        recipe = self.setup.recipe
        rng, uses = step_rng(recipe.run.seed, step), recipe.uses_diffusion_loss(step)
        rows = rng.choices(range(len(self.known.targets)), k=recipe.optim.batch)
        seeded = [(row, new_seed(rng)) for row in rows]
        mine = [pair for index, pair in enumerate(seeded) if shard.has(index)]
        return [self._batch(part, uses) for part in split(mine, recipe.optim.accumulation)]

    def _batch(self, rows: list[tuple[int, int]], uses_diffusion_loss: bool) -> Batch:
        states = self.known.states[[row for row, _ in rows]].float()
        targets = [replace(self.known.targets[row], seed=seed) for row, seed in rows]
        counts = self.setup.picture_losses.counts(targets, uses_diffusion_loss)
        return Batch((states, targets, uses_diffusion_loss), counts)

    def losses(self, inputs: Any) -> Losses:
        """The pictures' losses."""
        return self.setup.picture_losses(*inputs)


def train_mapper(
    recipe: MapperRecipe,
    out: Path,
    open_source: OpenSource,
    start_from: Path | None,
    resume: bool = False,
    load_diffusion: LoadDiffusion = load_frozen_diffusion,
) -> Mapper:
    """Leaves `mapper.safetensors` and the earlier run's `adapter/` in `out`; returns the mapper."""
    adapter = _check_start(start_from, out)

    def adapt_llm(llm: FrozenLLM, folder: Path) -> tuple[FrozenLLM, None]:
        llm = load_adapter(llm, adapter)
        if recipe.model.image_adapter:
            llm = load_vision(llm, folder, chosen=Path(recipe.model.image_adapter))
        return llm, None

    recipe, load_diffusion = as_pictures_allow(recipe, load_diffusion)
    run = Run(recipe, out, start_accelerator(recipe, out), resume)
    earlier = None if recipe.model.fresh else start_from
    setup = set_up(recipe, run, adapt_llm, open_source, earlier, load_diffusion)
    scale_to(setup.mapper, setup.text_targets)  # the earlier run may have listened to another text encoder
    batcher = StateBatcher(setup, precompute_voken_states(setup))
    trained = TrainableModules(setup.mapper, [], batcher.losses)
    optim = recipe.optim
    group = {"params": setup.mapper.parameters(), "lr": optim.mapper_lr, "weight_decay": optim.weight_decay}
    loop = TrainLoop(run, trained, [group], setup.source, setup.features)

    def save(step: int) -> None:
        run.save_mapper(setup.mapper, setup.llm_folder, step)
        shutil.copytree(adapter, out / "adapter", dirs_exist_ok=True)

    train(loop, lambda step: batcher.batches(step, loop.shard), lambda step: None, save)
    return setup.mapper


def _check_start(start_from: Path | None, out: Path) -> Path:
    """The adapter of the run to start from."""
    if start_from is None or not (start_from / "adapter").is_dir():
        raise BadInputError(
            f"--from {start_from} holds no adapter/. Give the --out folder of an align or finetune run: a mapper is "
            "trained on what the LLM says with that adapter."
        )
    if out.resolve() == start_from.resolve():
        raise BadInputError(f"--out and --from are both {out}. Name another folder for what is trained.")
    return start_from / "adapter"
