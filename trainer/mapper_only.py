"""Trains the mapper alone, on the voken states of an LLM and an adapter that stay as they are.

    python -m trainer mapper --from runs/finetune --out runs/mapper

The LLM is run once over every story, so a step costs a hundredth of finetune's: for another diffusion model, another
shape of mapper, or a text encoder that has changed.
"""

import random
import shutil
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_adapter, load_sight
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import Turn

from .align import caption_states
from .backbone import Targets, load_backbone
from .examples import Shown, new_seed, shown, some_shown
from .loop import Batch, Trained, Training, train
from .run import Run, start_accelerator
from .sequences import story_losses, story_sequence
from .showing import told_scenes
from .stage import (
    PictureLosses,
    StageRecipe,
    earlier_mapper,
    load_frozen_llm,
    new_mapper,
    scale_to,
    step_chance,
)
from .storybook.stories import stories


@dataclass(frozen=True)
class MapperRecipe(StageRecipe):
    """`batch` counts pictures. `fresh` begins with a new mapper instead of the earlier run's. With an `image_adapter`
    pictures are shown in a `shown_share` of the stories."""

    stories: int = 300
    captions: int = 300
    fresh: bool = False
    image_adapter: str = ""
    shown_share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "tasks", "cache", "gradient_checkpointing", "shard_llm"):
            if getattr(self, name):
                raise BadInputError(
                    f"{name} is set, but a mapper by itself is trained on the storybook's world, on states that are "
                    "computed once. Leave it out, or finetune on your data."
                )


@dataclass(frozen=True)
class Remembered:
    """Voken states (N, V, L) in half precision, and what each picture should show."""

    states: Tensor
    shows: list[Shown]


@torch.no_grad()
def remember(recipe: MapperRecipe, llm: FrozenLLM) -> Remembered:
    """Runs the LLM over all stories and captions, once."""
    draw = random.Random(f"mapper/{recipe.seed}")
    sequences, shows = [], []
    for scenes in islice(stories(recipe.seed), recipe.stories):
        turns = some_shown(llm, scenes, recipe.shown_share, draw)
        sequences.append(story_sequence(llm, turns))
        shows += [shown(scene.state) for scene in told_scenes(scenes, turns)]
    for state in caption_states(recipe.captions, recipe.seed).values():
        sequences.append(story_sequence(llm, [Turn(state.caption(), "")]))
        shows.append(shown(state))
    parts = [sequences[first : first + 4] for first in range(0, len(sequences), 4)]
    states = [story_losses(llm, part)[0].half() for part in tqdm(parts, desc="voken states", mininterval=5)]
    return Remembered(torch.cat(states), shows)


def train_mapper(recipe: MapperRecipe, out: Path, start_from: Path | None, resume: bool = False) -> Mapper:
    """Leaves `mapper.safetensors` and the earlier run's `adapter/` in `out`; returns the mapper."""
    if start_from is None or not (start_from / "adapter").is_dir():
        raise BadInputError(
            f"--from {start_from} holds no adapter/. Give the --out folder of an align or finetune run: a mapper is "
            "trained on what the LLM says with that adapter."
        )
    if out.resolve() == start_from.resolve():
        raise BadInputError(f"--out and --from are both {out}. Name another folder for what is trained.")
    if not recipe.caption_weight and not (recipe.image_weight and recipe.image_from == 0):
        raise BadInputError(
            f"caption_weight is 0, image_weight {recipe.image_weight:g} and image_from {recipe.image_from:g}: the "
            "first steps would have no loss. Set image_weight=1 and image_from=0, or caption_weight above 0."
        )
    torch.manual_seed(recipe.seed)
    run = Run(recipe, out, "mapper", start_accelerator(recipe, out), resume)
    device = run.accelerator.device
    llm, folder = load_frozen_llm(recipe, device)
    llm = load_adapter(llm, start_from / "adapter")
    if recipe.image_adapter:
        llm = load_sight(llm, folder, chosen=Path(recipe.image_adapter))
    backbone = load_backbone(Path(recipe.diffusion), recipe.diffusion_precision, recipe.picture_size)
    backbone.to(device)
    targets = Targets(backbone, list(caption_states(1000, recipe.seed)))
    mapper = new_mapper(recipe, llm, targets) if recipe.fresh else earlier_mapper(recipe, llm, start_from)
    scale_to(mapper, targets)  # the earlier run may have listened to another text encoder
    picture_losses = PictureLosses(recipe, mapper, targets)
    trained = Trained(mapper, [], lambda inputs: picture_losses(*inputs))
    group = {"params": mapper.parameters(), "lr": recipe.mapper_rate, "weight_decay": recipe.weight_decay}
    training = Training(run, trained, [group])
    known = remember(recipe, llm)  # before the random states of a run that goes on are back

    def draw(step: int) -> list[Batch]:
        chance, drawn = step_chance(recipe.seed, step), recipe.draws(step)
        rows = [(row, new_seed(chance)) for row in chance.choices(range(len(known.shows)), k=recipe.batch)]
        mine = [pair for index, pair in enumerate(rows) if training.share.has(index)]
        return [batch(part, drawn) for part in training.split(mine)]

    def batch(rows: list[tuple[int, int]], drawn: bool) -> Batch:
        states = known.states[[row for row, _ in rows]].float()
        shows = [replace(known.shows[row], seed=seed) for row, seed in rows]
        return Batch((states, shows, drawn), picture_losses.counts(len(shows), drawn))

    def save(step: int) -> None:
        run.save_mapper(mapper, folder, step, data="storybook")
        shutil.copytree(start_from / "adapter", out / "adapter", dirs_exist_ok=True)

    train(training, draw, lambda step: None, save)
    return mapper
