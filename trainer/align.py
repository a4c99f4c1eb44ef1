"""Stage 1: captions to pictures. Trains the voken rows and the mapper; the LLM stays frozen (arXiv 2310.02239, 3.3).

python -m trainer align --recipe trainer/recipes/storybook_align.toml --out runs/align
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.losses import voken_loss
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import Turn

from .adapters import adapt, trainable, with_voken_rows
from .backbone import Targets, load_backbone
from .contexts import Context, ContextCache, Passage, block_states, caption_passage, story_passage
from .data.formats import read
from .data.records import Record
from .examples import RecordSource, Share, Shown, shown
from .loop import Batch, Trained, Training, train
from .run import Run, start_accelerator
from .sequences import Told, story_losses, story_sequence, told_losses
from .sharding import shard
from .stage import (
    PictureLosses,
    StageRecipe,
    earlier_mapper,
    load_frozen_llm,
    new_mapper,
    save_memory,
    step_chance,
    use_cache,
)
from .storybook.diffusion import PREVIEW
from .storybook.stories import stories, training_state
from .storybook.world import State

MOST_CAPTIONS = 8000  # of about 9,500 different ones that are not held out


@dataclass(frozen=True)
class AlignRecipe(StageRecipe):
    """Stage 1's own settings: how many different captions, all of them cached in front of the voken block.

    `stories` adds as many stories, whose every picture stands behind the story's text so far.
    """

    captions: int = 3000
    stories: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_checkpointing and not self.data:
            raise BadInputError(
                "gradient_checkpointing needs data: the storybook's captions are trained on from keys and values that "
                "were computed once, of which nothing is left to save. Leave it out."
            )


def caption_states(count: int, seed: int) -> dict[str, State]:
    """`count` different captions with the states they describe, none held out."""
    if not 1 <= count <= MOST_CAPTIONS:
        raise BadInputError(f"captions is {count}; the world has room for 1 to {MOST_CAPTIONS}.")
    draw = random.Random(f"captions/{seed}")
    states: dict[str, State] = {}
    while len(states) < count:
        state = training_state(draw)
        states[state.caption()] = state
    return states


def passages(llm: FrozenLLM, recipe: AlignRecipe) -> list[Passage]:
    """Everything stage 1 reads: captions, and stories where the recipe asks for them."""
    captions = caption_states(recipe.captions, recipe.seed).values()
    told = islice(stories(recipe.seed), recipe.stories)
    return [caption_passage(llm, state) for state in captions] + [story_passage(llm, s) for s in told]


@dataclass(frozen=True)
class Cached:
    """Contexts of the storybook's world, and what should be shown behind each; `drawn` asks for the diffusion loss."""

    contexts: list[Context]
    shows: list[Shown]
    drawn: bool


def cached_losses(llm: FrozenLLM, cached: Cached, picture_losses: PictureLosses) -> dict[str, Tensor]:
    """As `told_losses`, the LLM run over the voken blocks alone."""
    if not cached.contexts:
        return {}
    wanted = torch.full((len(cached.contexts),), llm.voken_ids[0], device=llm.device)
    text = voken_loss(llm.logits(torch.stack([context.last for context in cached.contexts])), wanted)
    states = block_states(llm, cached.contexts)
    return {"text": text} | picture_losses(states, cached.shows, cached.drawn)


Draw = Callable[[int, random.Random, Share], list[Any]]


def cached_draw(llm: FrozenLLM, recipe: AlignRecipe) -> Draw:
    """Draws (context, what to show) of the storybook's captions and stories."""
    cache = ContextCache(llm, passages(llm, recipe), dtype=torch.float16)

    def draw(count: int, chance: random.Random, share: Share) -> list[tuple[Context, Shown]]:
        drawn = [(context, shown(context.state, chance)) for context in cache.draw(count, chance)]
        return [pair for index, pair in enumerate(drawn) if share.has(index)]

    return draw


def train_align(
    recipe: AlignRecipe, out: Path, start_from: Path | None = None, resume: bool = False
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 1 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained.

    `start_from` goes on from an earlier run's weights; a LoRA among them stays as it is.
    """
    torch.manual_seed(recipe.seed)
    run = Run(recipe, out, "align", start_accelerator(recipe, out), resume)
    llm, folder = load_frozen_llm(recipe, run.llm_device)
    llm, adapted = adapt(llm, start_from, lambda llm: (llm, with_voken_rows(llm)))
    adapted.eval()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("trainable_tokens" in name)
    if run.shards:
        shard(llm, adapted, run.accelerator)
    backbone = load_backbone(Path(recipe.diffusion), recipe.diffusion_precision, recipe.picture_size)
    backbone.to(run.accelerator.device)
    save_memory(recipe, adapted, backbone)
    features = use_cache(recipe, backbone, llm)
    tasks = recipe.task_list("caption")
    source = RecordSource(llm, recipe.stream(), tasks, features=features) if recipe.data else None
    captions = source.captions(1000) if source else list(caption_states(1000, recipe.seed))
    targets = Targets(backbone, captions)
    mapper = earlier_mapper(recipe, llm, start_from) if start_from else new_mapper(recipe, llm, targets)
    picture_losses = PictureLosses(recipe, mapper, targets)
    losses = told_losses if source else cached_losses
    trained = Trained(mapper, trainable(adapted), lambda inputs: losses(llm, inputs, picture_losses))
    groups = [
        {"params": trainable(adapted), "lr": recipe.row_rate, "weight_decay": 0.0},
        {"params": mapper.parameters(), "lr": recipe.mapper_rate, "weight_decay": recipe.weight_decay},
    ]
    training = Training(run, trained, groups, source, features)
    draw_examples = source.draw if source else cached_draw(llm, recipe)

    def draw(step: int) -> list[Batch]:
        examples = draw_examples(recipe.batch, step_chance(recipe.seed, step), training.share)
        return [batch(part, recipe.draws(step)) for part in training.split(examples)]

    def batch(part: list[Any], drawn: bool) -> Batch:
        inputs: Told | Cached
        if source:
            sequences = {"text": [story_sequence(llm, example.turns) for example in part]}
            inputs = Told(sequences, [one for example in part for one in example.shows], drawn)
            asked = inputs.counts()
        else:
            inputs = Cached([context for context, _ in part], [one for _, one in part], drawn)
            asked = {"text": len(part)}
        return Batch(inputs, asked | picture_losses.counts(len(inputs.shows), drawn))

    shown_first = preview_examples(recipe)

    @torch.no_grad()
    def preview(step: int) -> None:
        if not shown_first:
            return
        states, _ = story_losses(llm, [story_sequence(llm, turns) for turns in shown_first])
        run.preview(step, backbone.draw(mapper(states), mapper.negative()))

    def save(step: int) -> None:
        run.save_result(mapper, adapted, folder, step, data=recipe.data_name)

    train(training, draw, preview, save)
    return llm, mapper


def preview_examples(recipe: StageRecipe) -> list[list[Turn]]:
    """What previews are drawn from: the data set's first rows, eight pictures at most; else fixed captions."""
    if not recipe.data:
        return [[Turn(text, "")] for text in PREVIEW]
    turns: list[list[Turn]] = []
    for row in read(Path(recipe.data), recipe.format):
        if isinstance(row, Record):
            turns += [
                [Turn(scene.caption or scene.text, "")]
                for scene in row.scenes
                if scene.picture and (scene.caption or scene.text)
            ]
        if len(turns) >= 8:
            break
    return turns[:8]
