"""Stage 1: captions to pictures. Trains the voken rows and the mapper; the LLM stays frozen (arXiv 2310.02239, 3.3).

python -m trainer align --recipe trainer/recipes/storybook_align.toml --out runs/align
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm_files import default_llm
from minigpt5_core.losses import voken_loss
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import Turn

from .adapters import adapt, trainable, with_voken_rows
from .contexts import ContextCache, Passage, block_states, caption_passage, story_passage
from .data.formats import read
from .data.records import Record
from .examples import RecordSource, Shown, shown
from .run import Run, optimise, start_accelerator, train
from .sequences import story_losses, story_sequence
from .stage import (
    PictureLosses,
    StageRecipe,
    Targets,
    Trained,
    earlier_mapper,
    load_diffusion,
    new_mapper,
    picture_latents,
    step_generator,
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


Batches = Callable[[int, random.Random], tuple[Tensor, list[Shown], Tensor]]


def cached_batches(llm: FrozenLLM, recipe: AlignRecipe) -> Batches:
    """Voken states (B, V, L), what they should show, and the text loss, of the storybook's captions and stories."""
    cache = ContextCache(llm, passages(llm, recipe), dtype=torch.float16)

    def draw(count: int, chance: random.Random) -> tuple[Tensor, list[Shown], Tensor]:
        contexts = cache.draw(count, chance)
        wanted = torch.full((count,), llm.voken_ids[0], device=llm.device)
        text = voken_loss(llm.logits(torch.stack([context.last for context in contexts])), wanted)
        return block_states(llm, contexts), [shown(context.state) for context in contexts], text

    return draw


def record_batches(llm: FrozenLLM, source: RecordSource) -> Batches:
    """The same of a data set's captions."""

    def draw(count: int, chance: random.Random) -> tuple[Tensor, list[Shown], Tensor]:
        examples = source.draw(count, chance)
        states, text = story_losses(llm, [story_sequence(llm, example.turns) for example in examples])
        return states, [one for example in examples for one in example.shows], text

    return draw


def train_align(
    recipe: AlignRecipe, out: Path, start_from: Path | None = None, resume: bool = False
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 1 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained.

    `start_from` goes on from an earlier run's weights; a LoRA among them stays as it is.
    """
    torch.manual_seed(recipe.seed)
    accelerator = start_accelerator(recipe, out)
    run = Run(recipe, out, "align", accelerator, resume)
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_llm(folder, recipe.vokens, device=accelerator.device)
    adapted = adapt(llm, start_from, with_voken_rows).eval()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("trainable_tokens" in name)
    pipeline = load_diffusion(Path(recipe.diffusion)).to(accelerator.device)
    source = RecordSource(llm, recipe.stream(), recipe.task_list("caption")) if recipe.data else None
    captions = source.captions(1000) if source else list(caption_states(1000, recipe.seed))
    targets = Targets(pipeline, captions)
    mapper = earlier_mapper(recipe, llm, start_from) if start_from else new_mapper(recipe, llm, targets)
    trained = Trained(mapper, trainable(adapted))
    optimizer = torch.optim.AdamW(
        [
            {"params": trainable(adapted), "lr": recipe.row_rate, "weight_decay": 0.0},
            {"params": mapper.parameters(), "lr": recipe.mapper_rate, "weight_decay": recipe.weight_decay},
        ]
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(recipe.warmup * recipe.steps), recipe.steps)
    trained, optimizer, schedule = accelerator.prepare(trained, optimizer, schedule)
    if source:
        accelerator.register_for_checkpointing(source)
    start = run.resume() if resume else 0
    batches = record_batches(llm, source) if source else cached_batches(llm, recipe)
    shown_first = preview_examples(recipe)
    picture_losses = PictureLosses(recipe, mapper, targets)

    def one_step(step: int) -> dict[str, float]:
        draw, generator = step_generator(recipe.seed, step)
        states, shows, text_loss = batches(recipe.batch, draw)
        latents = None
        if recipe.image_weight and step > recipe.image_from * recipe.steps:
            latents = picture_latents(pipeline, shows, draw)
        losses = picture_losses(states, [one.caption for one in shows], latents, generator)
        losses["text"] = text_loss
        optimise(accelerator, trained, optimizer, schedule, picture_losses.weights.total(**losses))
        if step % recipe.preview_every == 0:
            preview(step)
        return {name: loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def preview(step: int) -> None:
        states, _ = story_losses(llm, [story_sequence(llm, turns) for turns in shown_first])
        run.preview(step, pipeline, mapper(states).tokens, mapper.negative().tokens)

    train(
        run,
        start,
        one_step,
        lambda step: run.save_result(mapper, adapted, folder, step, data=recipe.data_name),
    )
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
                if scene.picture and scene.text
            ]
        if len(turns) >= 8:
            break
    return turns[:8]
