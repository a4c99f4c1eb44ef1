"""Stage 2: interleaved stories. Trains LoRA or a prefix, the voken rows and the mapper (arXiv 2310.02239, 3.3).

    python -m trainer finetune --recipe trainer/recipes/storybook_finetune.toml --from runs/align --out runs/finetune

A whole story is one sequence with all its voken blocks, so one forward serves all its pictures.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm, load_sight
from minigpt5_core.llm_files import default_llm
from minigpt5_core.losses import IGNORED, voken_loss
from minigpt5_core.mapper import Mapper
from minigpt5_core.prompts import Turn, chat_prompt
from minigpt5_core.vokens import block_starts, gather_voken_states

from .adapters import adapt, trainable, voken_tables, with_prefix
from .align import caption_states, picture_latents
from .showing import questions, shown_turns, told_scenes
from .stage import (
    PictureLosses,
    Run,
    StageRecipe,
    Targets,
    Trained,
    earlier_mapper,
    load_diffusion,
    new_mapper,
    optimise,
    step_generator,
    train,
)
from .storybook.stories import TrueScene, stories, training_state


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


@dataclass(frozen=True)
class StorySequence:
    """A story as ids, the labels of what the LLM should have written (-100 elsewhere), and where its blocks begin.

    A picture that is shown takes as many ids, all the slot's, as it has image tokens; `images` holds those, (K, L).
    """

    ids: list[int]
    labels: list[int]
    blocks: list[int]
    images: list[Tensor] = field(default_factory=list)


def story_sequence(llm: FrozenLLM, turns: Sequence[Turn]) -> StorySequence:
    """Every reply counts: its text, [IMG0] and the end mark; later vokens and pictures are given, never asked for."""
    images = chat_prompt(llm, turns).images
    ids = _spread(llm, turns)
    labels = [IGNORED] * len(ids)
    unasked = set(llm.voken_ids[1:])
    last = {llm.tokenizer.eos_token_id, llm.picture_id}
    for index, turn in enumerate(turns):
        start = len(_spread(llm, [*turns[:index], Turn(turn.request)]))
        stop = next(position for position in range(start, len(ids)) if ids[position] in last)
        for position in range(start, stop if ids[stop] == llm.picture_id else stop + 1):
            if ids[position] not in unasked:
                labels[position] = ids[position]
    return StorySequence(ids, labels, block_starts(ids, llm.voken_ids), images)


def _spread(llm: FrozenLLM, turns: Sequence[Turn]) -> list[int]:
    """The turns' ids, a picture's slot repeated for each of its image tokens."""
    prompt = chat_prompt(llm, turns)
    images = iter(prompt.images)
    return [
        token
        for slot in prompt.ids
        for token in ([slot] * len(next(images)) if slot == prompt.image_id else [slot])
    ]


def as_turns(scenes: Sequence[TrueScene]) -> list[Turn]:
    """A story of the world as requests and replies."""
    return [Turn(scene.request, scene.text) for scene in scenes]


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


def some_shown(llm: FrozenLLM, scenes: Sequence[TrueScene], share: float, draw: random.Random) -> list[Turn]:
    """A story of the world; to an LLM that sees, with pictures in a `share` of the stories."""
    shown = llm.image_encoder is not None and draw.random() < share
    return shown_turns(llm, scenes, draw) if shown else as_turns(scenes)


def story_losses(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> tuple[Tensor, Tensor]:
    """One forward over stories padded behind: voken states of all blocks (k, V, L), and the text loss."""
    # no attention mask: padding stands behind everything that counts, and attention is causal
    hidden = _hidden(llm, sequences)
    blocks = [(row, start) for row, sequence in enumerate(sequences) for start in sequence.blocks]
    states = gather_voken_states(hidden, blocks, len(llm.voken_ids))
    return states, _text_loss(llm, sequences, hidden)


def text_losses(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """The same forward for sequences that hold no voken blocks: the text loss alone."""
    return _text_loss(llm, sequences, _hidden(llm, sequences))


def _hidden(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """(B, S, L) last-layer states."""
    known = llm.begin(len(sequences))
    return llm.decoder(inputs_embeds=_embed(llm, sequences), past_key_values=known).last_hidden_state


def _text_loss(llm: FrozenLLM, sequences: Sequence[StorySequence], hidden: Tensor) -> Tensor:
    asked = [
        (row, position - 1, label)
        for row, sequence in enumerate(sequences)
        for position, label in enumerate(sequence.labels)
        if label != IGNORED
    ]
    row, position, label = (torch.tensor(column, device=llm.device) for column in zip(*asked, strict=True))
    return voken_loss(llm.logits(hidden[row, position]), label)


def _embed(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """(B, S, L), padded behind, pictures in their places."""
    pad = llm.tokenizer.pad_token_id or 0
    rows = [torch.tensor(sequence.ids) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(llm.device)
    slots = ids == llm.picture_id
    embedded = llm.embed(ids.masked_fill(slots, pad))
    images = [image for sequence in sequences for image in sequence.images]
    return embedded.masked_scatter(slots[..., None], torch.cat(images).to(embedded)) if images else embedded


def train_finetune(
    recipe: FinetuneRecipe, out: Path, start_from: Path | None = None, resume: bool = False
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 2 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained."""
    torch.manual_seed(recipe.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    run = Run(recipe, out, "finetune", accelerator, resume)
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_llm(folder, recipe.vokens, device=accelerator.device)
    if recipe.image_adapter:
        load_sight(llm, folder, chosen=Path(recipe.image_adapter))
    adapted = adapt(llm, start_from, lambda llm: with_adapter(llm, recipe))
    pipeline = load_diffusion(Path(recipe.diffusion)).to(accelerator.device)
    data = list(islice(stories(recipe.seed), recipe.stories))
    targets = Targets(pipeline, list(caption_states(1000, recipe.seed)))
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
    start = run.resume() if resume else 0
    picture_losses = PictureLosses(recipe, mapper, targets)
    adapted.train()

    def one_step(step: int) -> dict[str, float]:
        draw, generator = step_generator(recipe.seed, step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # LoRA's dropout
        batch = draw.sample(data, recipe.batch)
        told = [some_shown(llm, scenes, recipe.shown_share, draw) for scenes in batch]
        shows = [s.state for story, turns in zip(batch, told, strict=True) for s in told_scenes(story, turns)]
        states, text_loss = story_losses(llm, [story_sequence(llm, turns) for turns in told])
        if recipe.captions:  # a batch of their own: padded to a story's length they would cost as much
            alone = [training_state(draw) for _ in range(recipe.captions)]
            sequences = [story_sequence(llm, [Turn(state.caption(), "")]) for state in alone]
            more, caption_text = story_losses(llm, sequences)
            states, text_loss = torch.cat((states, more)), text_loss + caption_text
            shows += alone
        latents = None
        if recipe.image_weight and step > recipe.image_from * recipe.steps:
            latents = picture_latents(pipeline, shows, draw)
        losses = picture_losses(states, [state.caption() for state in shows], latents, generator)
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
        """The first two held-out stories, their true sentences given."""
        adapted.eval()
        told = list(islice(stories(0, "test"), 2))
        states, _ = story_losses(llm, [story_sequence(llm, as_turns(scenes[:4])) for scenes in told])
        run.preview(step, pipeline, mapper(states).tokens, mapper.negative().tokens)
        adapted.train()

    train(run, start, one_step, lambda step: run.save_result(mapper, adapted, folder, step, data="storybook"))
    return llm, mapper
