"""Stage 2: interleaved stories. Trains LoRA or a prefix, the voken rows and the mapper (arXiv 2310.02239, 3.3).

    python -m trainer finetune --recipe trainer/recipes/storybook_finetune.toml --from runs/align --out runs/finetune

A whole story is one sequence with all its voken blocks, so one forward serves all its pictures.
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_sight
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import NEXT, Turn

from .adapters import adapt, decoder_targets, trainable, voken_tables, with_prefix
from .backbone import Targets, load_backbone
from .data.cache import CachedFeatures
from .data.formats import read
from .data.records import Record
from .examples import Example, RecordSource, Share, Source, StorybookSource, new_seed, shown
from .loop import Batch, Trained, Training, train
from .run import Run, start_accelerator
from .sequences import Told, story_losses, story_sequence, told_losses
from .sharding import shard
from .showing import questions
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
from .storybook.stories import stories, training_state


@dataclass(frozen=True)
class FinetuneRecipe(StageRecipe):
    """Stage 2's own settings; LoRA's are the published ones. `batch` counts stories, beside which `captions` single
    captions keep what stage 1 taught.

    With an `image_adapter`, or where it sees by itself, the LLM is shown pictures, in a `shown_share` of the stories,
    and asked `questions` times a step what one shows; what it sees by stays as it is.

    `adapter` is "lora", or "prefix": `prefix_tokens` learned keys and values in front, made by a network of width
    `prefix_width` as published (0: learned themselves), at the LoRA's rate.
    """

    stories: int = 2000
    captions: int = 0
    image_adapter: str = ""
    shown_share: float = 0.5
    questions: int = 2
    adapter: str = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple = ("q_proj", "v_proj")
    lora_rate: float = 5e-4
    prefix_tokens: int = 5
    prefix_width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter not in ("lora", "prefix"):
            raise BadInputError(f"adapter is {self.adapter!r}; it can be lora or prefix.")


def with_adapter(llm: FrozenLLM, recipe: FinetuneRecipe) -> tuple[FrozenLLM, PeftModel]:
    """The LLM with what the recipe trains of it; the causal LM is shared, changed in place and itself stays frozen."""
    if recipe.adapter == "prefix":
        return with_prefix(llm, recipe.prefix_tokens, recipe.prefix_width)
    return llm, with_lora(llm, recipe)


def with_lora(llm: FrozenLLM, recipe: FinetuneRecipe) -> PeftModel:
    """Adds LoRA and trainable voken rows; the LLM itself is changed in place and stays frozen."""
    tables = voken_tables(llm)
    return get_peft_model(
        llm.causal_lm,
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=decoder_targets(llm, recipe.lora_targets),
            trainable_token_indices=dict.fromkeys(tables, llm.voken_ids)
            if len(tables) > 1
            else llm.voken_ids,
        ),
    )


def examples_of(recipe: FinetuneRecipe, llm: FrozenLLM, features: CachedFeatures | None = None) -> Source:
    """What the recipe trains on: its data set, or the storybook's stories."""
    if recipe.data:
        return RecordSource(llm, recipe.stream(), recipe.task_list("story"), recipe.shown_share, features)
    return StorybookSource(llm, recipe.stories, recipe.seed, recipe.shown_share)


def parameter_groups(recipe: FinetuneRecipe, adapted: PeftModel, mapper: Mapper) -> list[dict[str, Any]]:
    """What the optimiser moves, and how fast: voken rows, LoRA or prefix, mapper."""
    named = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    rows = [parameter for name, parameter in named if "trainable_tokens" in name]
    others = [parameter for name, parameter in named if "trainable_tokens" not in name]
    return [
        {"params": rows, "lr": recipe.row_rate, "weight_decay": 0.0},
        {"params": others, "lr": recipe.lora_rate, "weight_decay": recipe.weight_decay},
        {"params": mapper.parameters(), "lr": recipe.mapper_rate, "weight_decay": recipe.weight_decay},
    ]


def draw_examples(
    recipe: FinetuneRecipe, llm: FrozenLLM, source: Source, step: int, share: Share
) -> dict[str, list[Example]]:
    """A process's share of a step, by the name of its text loss: stories, single captions, questions."""
    chance = step_chance(recipe.seed, step)
    drawn = {"text": source.draw(recipe.batch, chance, share)}
    if recipe.captions:  # a batch of their own: padded to a story's length they would cost as much
        alone = [shown(training_state(chance), chance) for _ in range(recipe.captions)]
        drawn["caption_text"] = [
            Example([Turn(one.caption, "")], [one]) for index, one in enumerate(alone) if share.has(index)
        ]
    if llm.sees and recipe.questions:
        seeds = [new_seed(chance) for _ in range(recipe.questions)]
        mine = [random.Random(seed) for index, seed in enumerate(seeds) if share.has(index)]
        drawn["question_text"] = [Example(turns, []) for own in mine for turns in questions(llm, 1, own)]
    return drawn


def as_told(llm: FrozenLLM, examples: dict[str, list[Example]], drawn: bool) -> Told:
    """The examples as sequences."""
    sequences = {
        name: [story_sequence(llm, example.turns) for example in some] for name, some in examples.items()
    }
    return Told(
        sequences, [one for some in examples.values() for example in some for one in example.shows], drawn
    )


def preview_stories(recipe: FinetuneRecipe) -> list[list[Turn]]:
    """What previews are drawn from, four scenes of two stories: the data set's first, or the first held-out ones."""
    if not recipe.data:
        told = [[(s.request, s.text) for s in scenes] for scenes in islice(stories(0, "test"), 2)]
    else:
        rows = (row for row in read(Path(recipe.data), recipe.format) if isinstance(row, Record))
        records = ([(NEXT, s.text) for s in row.scenes if s.picture and s.text] for row in rows)
        told = list(islice((scenes for scenes in records if scenes), 2))
    return [[Turn(request, text) for request, text in scenes[:4]] for scenes in told if scenes]


def train_finetune(
    recipe: FinetuneRecipe, out: Path, start_from: Path | None = None, resume: bool = False
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 2 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained."""
    torch.manual_seed(recipe.seed)
    run = Run(recipe, out, "finetune", start_accelerator(recipe, out), resume)
    llm, folder = load_frozen_llm(recipe, run.llm_device)
    if recipe.image_adapter:
        llm = load_sight(llm, folder, chosen=Path(recipe.image_adapter))
    llm, adapted = adapt(llm, start_from, lambda llm: with_adapter(llm, recipe))
    if run.shards:
        shard(llm, adapted, run.accelerator)
    backbone = load_backbone(Path(recipe.diffusion), recipe.diffusion_precision, recipe.picture_size)
    backbone.to(run.accelerator.device)
    save_memory(recipe, adapted, backbone)
    features = use_cache(recipe, backbone, llm)
    source = examples_of(recipe, llm, features)
    targets = Targets(backbone, source.captions(1000))
    mapper = earlier_mapper(recipe, llm, start_from) if start_from else new_mapper(recipe, llm, targets)
    picture_losses = PictureLosses(recipe, mapper, targets)
    trained = Trained(mapper, trainable(adapted), lambda told: told_losses(llm, told, picture_losses))
    training = Training(run, trained, parameter_groups(recipe, adapted, mapper), source, features)
    adapted.train()

    def draw(step: int) -> list[Batch]:
        own = step * training.share.world + training.share.rank
        torch.manual_seed(recipe.seed * 1_000_003 + own)  # LoRA's dropout
        examples = draw_examples(recipe, llm, source, step, training.share)
        parts = {name: training.split(some) for name, some in examples.items()}
        return [
            batch({name: some[part] for name, some in parts.items()}, recipe.draws(step))
            for part in range(recipe.accumulation)
        ]

    def batch(examples: dict[str, list[Example]], drawn: bool) -> Batch:
        told = as_told(llm, examples, drawn)
        return Batch(told, told.counts() | picture_losses.counts(len(told.shows), drawn))

    shown_first = preview_stories(recipe)

    @torch.no_grad()
    def preview(step: int) -> None:
        """The first scenes of two stories, their true sentences given."""
        if not shown_first:
            return
        adapted.eval()
        states, _ = story_losses(llm, [story_sequence(llm, turns) for turns in shown_first])
        run.preview(step, backbone.draw(mapper(states), mapper.negative()))
        adapted.train()

    def save(step: int) -> None:
        run.save_result(mapper, adapted, folder, step, data=recipe.data_name)

    train(training, draw, preview, save)
    return llm, mapper
