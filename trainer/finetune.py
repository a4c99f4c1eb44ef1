"""Stage 2: interleaved stories. Trains LoRA or a prefix, the voken rows and the mapper (arXiv 2310.02239, 3.3).

    python -m trainer finetune --recipe trainer/recipes/storybook_finetune.toml --from runs/align --out runs/finetune

A whole story is one sequence with all its voken blocks, so one forward serves all its pictures.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm, load_sight
from minigpt5_core.llm_files import default_llm
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import NEXT, Turn

from .adapters import adapt, trainable, voken_tables, with_prefix
from .data.formats import read
from .data.records import Record
from .examples import RecordSource, Source, StorybookSource, shown
from .run import Run, optimise, start_accelerator, train
from .sequences import story_losses, story_sequence, text_losses
from .showing import questions
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
from .storybook.stories import stories, training_state


@dataclass(frozen=True)
class FinetuneRecipe(StageRecipe):
    """Stage 2's own settings; LoRA's are the published ones. `batch` counts stories, beside which `captions` single
    captions keep what stage 1 taught.

    With an `image_adapter` the LLM is shown pictures, in a `shown_share` of the stories, and asked `questions` times a
    step what one shows; the image adapter itself stays as it is.

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


def with_adapter(llm: FrozenLLM, recipe: FinetuneRecipe) -> PeftModel:
    """Adds what the recipe trains of the LLM, which is changed in place and itself stays frozen."""
    if recipe.adapter == "prefix":
        return with_prefix(llm, recipe.prefix_tokens, recipe.prefix_width)
    return with_lora(llm, recipe)


def with_lora(llm: FrozenLLM, recipe: FinetuneRecipe) -> PeftModel:
    """Adds LoRA and trainable voken rows; the LLM itself is changed in place and stays frozen."""
    tables = voken_tables(llm)
    return get_peft_model(
        llm.causal_lm,
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=list(recipe.lora_targets),
            trainable_token_indices=dict.fromkeys(tables, llm.voken_ids)
            if len(tables) > 1
            else llm.voken_ids,
        ),
    )


def examples_of(recipe: FinetuneRecipe, llm: FrozenLLM) -> Source:
    """What the recipe trains on: its data set, or the storybook's stories."""
    if recipe.data:
        return RecordSource(llm, recipe.stream(), recipe.task_list("story"), recipe.shown_share)
    return StorybookSource(llm, recipe.stories, recipe.seed, recipe.shown_share)


def preview_stories(recipe: FinetuneRecipe) -> list[list[Turn]]:
    """What previews are drawn from, four scenes of two stories: the data set's first, or the first held-out ones."""
    if not recipe.data:
        told = [[(s.request, s.text) for s in scenes] for scenes in islice(stories(0, "test"), 2)]
    else:
        records = (row for row in read(Path(recipe.data), recipe.format) if isinstance(row, Record))
        told = [
            [(NEXT, s.text) for s in record.scenes if s.picture and s.text] for record in islice(records, 2)
        ]
    return [[Turn(request, text) for request, text in scenes[:4]] for scenes in told if scenes]


def train_finetune(
    recipe: FinetuneRecipe, out: Path, start_from: Path | None = None, resume: bool = False
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 2 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained."""
    torch.manual_seed(recipe.seed)
    accelerator = start_accelerator(recipe, out)
    run = Run(recipe, out, "finetune", accelerator, resume)
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_llm(folder, recipe.vokens, device=accelerator.device)
    if recipe.image_adapter:
        load_sight(llm, folder, chosen=Path(recipe.image_adapter))
    adapted = adapt(llm, start_from, lambda llm: with_adapter(llm, recipe))
    pipeline = load_diffusion(Path(recipe.diffusion)).to(accelerator.device)
    source = examples_of(recipe, llm)
    targets = Targets(pipeline, source.captions(1000))
    mapper = earlier_mapper(recipe, llm, start_from) if start_from else new_mapper(recipe, llm, targets)
    trained = Trained(mapper, trainable(adapted))
    rows = [p for name, p in adapted.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    others = [
        p for name, p in adapted.named_parameters() if p.requires_grad and "trainable_tokens" not in name
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": rows, "lr": recipe.row_rate, "weight_decay": 0.0},
            {"params": others, "lr": recipe.lora_rate, "weight_decay": recipe.weight_decay},
            {"params": mapper.parameters(), "lr": recipe.mapper_rate, "weight_decay": recipe.weight_decay},
        ]
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(recipe.warmup * recipe.steps), recipe.steps)
    trained, optimizer, schedule = accelerator.prepare(trained, optimizer, schedule)
    accelerator.register_for_checkpointing(source)
    start = run.resume() if resume else 0
    picture_losses = PictureLosses(recipe, mapper, targets)
    shown_first = preview_stories(recipe)
    adapted.train()

    def one_step(step: int) -> dict[str, float]:
        draw, generator = step_generator(recipe.seed, step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # LoRA's dropout
        examples = source.draw(recipe.batch, draw)
        shows = [one for example in examples for one in example.shows]
        states, text_loss = story_losses(llm, [story_sequence(llm, example.turns) for example in examples])
        if recipe.captions:  # a batch of their own: padded to a story's length they would cost as much
            alone = [shown(training_state(draw)) for _ in range(recipe.captions)]
            sequences = [story_sequence(llm, [Turn(one.caption, "")]) for one in alone]
            more, caption_text = story_losses(llm, sequences)
            states, text_loss = torch.cat((states, more)), text_loss + caption_text
            shows += alone
        latents = None
        if recipe.image_weight and step > recipe.image_from * recipe.steps and shows:
            latents = picture_latents(pipeline, shows, draw)
        losses = picture_losses(states, [one.caption for one in shows], latents, generator)
        losses["text"] = text_loss
        if recipe.image_adapter and recipe.questions:
            asked = [story_sequence(llm, turns) for turns in questions(llm, recipe.questions, draw)]
            losses["text"] = text_loss + text_losses(llm, asked)
        optimise(accelerator, trained, optimizer, schedule, picture_losses.weights.total(**losses))
        if step % recipe.preview_every == 0:
            preview(step)
        return {name: loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def preview(step: int) -> None:
        """The first scenes of two stories, their true sentences given."""
        adapted.eval()
        states, _ = story_losses(llm, [story_sequence(llm, turns) for turns in shown_first])
        run.preview(step, pipeline, mapper(states).tokens, mapper.negative().tokens)
        adapted.train()

    train(
        run,
        start,
        one_step,
        lambda step: run.save_result(mapper, adapted, folder, step, data=recipe.data_name),
    )
    return llm, mapper
