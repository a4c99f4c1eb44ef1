"""Gives the frozen LLM vision: trains an image encoder and its projector, and nothing else.

    python -m trainer image-adapter --recipe trainer/recipes/storybook_image_adapter.toml --out runs/image_adapter

First the image tokens are fitted to the LLM's own embeddings of the words of the picture's caption, which needs no
pass through the LLM and so takes minutes; then they are trained through the LLM, on stories and on captions.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling, generate
from minigpt5_core.llm import FrozenLLM, load_adapter, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.losses import caption_loss
from minigpt5_core.story.prompts import chat_prompt
from minigpt5_core.vision import (
    ImageAdapterHeader,
    ImageEncoder,
    ImageEncoderConfig,
    load_image_adapter,
    picture_tensor,
    save_image_adapter,
)
from minigpt5_core.vision.image_adapter import IMAGE_ADAPTER

from ...common.provenance import package_version
from ...diffusion import TextTargets, load_frozen_diffusion
from ...llm.sequences import story_losses, story_sequence, text_losses
from ...training.optimise import optimise
from ..world.render import render
from ..world.state import BY_TIME, COMPANIONS, FACTS, HEROES, PROPS, WORLD, State
from ..world.stories import held_out_state, stories, training_state
from ..world.visual_turns import (
    caption_turns,
    interleaved_turns,
    questions,
    scenes_to_generate,
    soft_pictures,
)

Save = Callable[[], None]
CAPTION = re.compile(
    rf"a ({'|'.join(HEROES)})(?: with a ({'|'.join(phrase for phrase, _ in PROPS.values())}))? "
    rf"({'|'.join(place.caption for place in WORLD.places.values())}) ({'|'.join(BY_TIME.values())})"
    rf"(?: and a ({'|'.join(COMPANIONS)}))?"
)


@dataclass(frozen=True)
class ImageAdapterRecipe:
    """Two phases: `word_steps` of `word_batch` pictures, then `story_steps` of `story_batch` stories and
    `caption_batch` questions. `alignment_weight` is the weight of the caption loss, on what the mapper makes of the
    vokens behind a picture."""

    llm: str = ""
    adapter: str = "storybook/loras/storybook"
    mapper: str = "storybook/voken_mappers/storybook.safetensors"
    diffusion: str = "storybook/diffusers"
    tokens: int = 16
    word_steps: int = 2500
    word_batch: int = 32
    word_rate: float = 2e-3
    story_steps: int = 300
    story_batch: int = 2
    caption_batch: int = 6
    story_rate: float = 4e-4
    alignment_weight: float = 1.0
    pictures: int = 200
    save_every: int = 50
    seed: int = 0


def train_image_adapter(recipe: ImageAdapterRecipe, out: Path, start: Path | None = None) -> dict[str, float]:
    """Writes `image_adapter.safetensors` in `out`, and returns the share of held-out captions right, by fact."""
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mapper = load_mapper(Path(recipe.mapper))[0].to(device)
    llm = load_adapter(load_llm(folder, mapper.config.vokens, device=device), Path(recipe.adapter))
    encoder, earlier = _encoder(recipe, llm, start)
    llm = llm.with_vision(encoder.to(device))
    steps = f"{recipe.word_steps} + {recipe.story_steps}"
    trained = {
        "stage": "image adapter",
        "steps": steps,
        "seed": recipe.seed,
        "data": "storybook",
        "code": package_version("minigpt5"),
    } | ({"from": earlier} if earlier else {})
    header = ImageAdapterHeader(folder.name, llm.width, hash_weights(folder), trained)

    def save() -> None:
        save_image_adapter(out / IMAGE_ADAPTER, encoder, header)

    _train_words(recipe, llm, save)
    if recipe.story_steps:
        _train_stories(recipe, llm, mapper.requires_grad_(False), save)
    encoder.eval()
    shares = caption_accuracy(llm, recipe.pictures)
    print("captions:", "  ".join(f"{name} {share:.3f}" for name, share in shares.items()), f"in {out}")
    return shares


def _encoder(
    recipe: ImageAdapterRecipe, llm: FrozenLLM, start: Path | None
) -> tuple[ImageEncoder, dict[str, Any]]:
    """A new encoder, or an earlier run's with what its header says of its training."""
    if start is not None:
        encoder, header = load_image_adapter(start / IMAGE_ADAPTER if start.is_dir() else start)
        if header.llm_width != llm.width:
            raise BadInputError(
                f"--from {start} is for an LLM {header.llm_width} wide; this one is {llm.width}."
            )
        return encoder, header.trained
    encoder = ImageEncoder(ImageEncoderConfig(llm.width, tokens=recipe.tokens))
    words = sorted(
        {token for state in _states(random.Random(0), 500) for token in llm.encode(state.caption())}
    )
    table = llm.embed(torch.tensor(words, device=llm.device)).detach().cpu()
    encoder.mean.copy_(table.mean(0))
    encoder.scale.copy_(table.std(0))
    return encoder, {}


def _states(rng: random.Random, count: int) -> list[State]:
    return [training_state(rng) for _ in range(count)]


def _train_words(recipe: ImageAdapterRecipe, llm: FrozenLLM, save: Save) -> None:
    """The first phase: image token k is fitted to the embedding of the caption's token k, padded with full stops."""
    encoder = llm.image_encoder
    assert isinstance(encoder, ImageEncoder)
    rng = random.Random(f"words/{recipe.seed}")
    count = encoder.config.tokens
    stop = llm.encode(".")[0]

    def step_loss(step: int) -> dict[str, Tensor]:
        states = _states(rng, recipe.word_batch)
        ids = [(llm.encode(state.caption()) + [stop] * count)[:count] for state in states]
        target = llm.embed(torch.tensor(ids, device=llm.device)).detach()
        tokens = encoder(soft_pictures(states, rng).to(llm.device))
        return {"loss": caption_loss(tokens, target, encoder.scale)}

    _optimise(
        encoder.train(),
        step_loss,
        steps=recipe.word_steps,
        samples=recipe.word_batch,
        rate=recipe.word_rate,
        save_every=10 * recipe.save_every,
        save=save,
    )


def _train_stories(recipe: ImageAdapterRecipe, llm: FrozenLLM, mapper: Mapper, save: Save) -> None:
    """The second phase: stories with pictures in them, and captions, through the frozen LLM and the frozen mapper."""
    encoder = llm.image_encoder
    assert isinstance(encoder, ImageEncoder)
    captions = [state.caption() for state in _states(random.Random(1), 500)]
    targets = TextTargets(load_frozen_diffusion(Path(recipe.diffusion)).to(llm.device), captions)
    rng = random.Random(f"stories/{recipe.seed}")
    stream = stories(recipe.seed + 1000)

    def step_loss(step: int) -> dict[str, Tensor]:
        batch = list(islice(stream, recipe.story_batch))
        batch_turns = [interleaved_turns(llm, scenes, rng) for scenes in batch]
        voken_states, text = story_losses(llm, [story_sequence(llm, turns) for turns in batch_turns])
        own_captions = [
            scene.caption
            for scenes, turns in zip(batch, batch_turns, strict=True)
            for scene in scenes_to_generate(scenes, turns)
        ]
        caption = targets.loss(mapper(voken_states), own_captions, standardised=True)
        questioned = [story_sequence(llm, turns) for turns in questions(llm, recipe.caption_batch, rng)]
        return {"text": text, "caption": caption, "question_text": text_losses(llm, questioned)}

    _optimise(
        encoder.eval(),  # batch statistics were learned from many pictures; a handful here would only blur them
        step_loss,
        steps=recipe.story_steps,
        samples=recipe.story_batch,
        rate=recipe.story_rate,
        save_every=recipe.save_every,
        save=save,
        weights={"caption": recipe.alignment_weight},
    )


def _optimise(
    encoder: ImageEncoder,
    step_loss: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    samples: int,
    rate: float,
    save_every: int,
    save: Save,
    weights: dict[str, float] | None = None,
) -> None:
    """One cycle of AdamW over the encoder."""
    optimizer = torch.optim.AdamW(encoder.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(2, steps), pct_start=0.1)
    optimise(
        optimizer,
        schedule,
        step_loss,
        steps=steps,
        samples=samples,
        save=save,
        save_every=save_every,
        weights=weights,
    )


def read_caption(text: str) -> State | None:
    """The state that a caption of the world describes; None for any other text."""
    found = CAPTION.search(text)
    if found is None:
        return None
    hero, prop, place, time, companion = found.groups()
    return State(
        hero,
        next(name for name, value in WORLD.places.items() if value.caption == place),
        next(name for name, value in BY_TIME.items() if value == time),
        next((name for name, (phrase, _) in PROPS.items() if phrase == prop), None),
        companion,
    )


@torch.no_grad()
def caption_accuracy(llm: FrozenLLM, count: int, seed: int = 0) -> dict[str, float]:
    """The share of facts right in the LLM's captions of fresh pictures, all of held-out combinations."""
    rng = random.Random(f"captions test/{seed}")
    states = [held_out_state(rng) for _ in range(count)]
    right = dict.fromkeys(FACTS, 0)
    for first in range(0, count, 20):
        part = states[first : first + 20]
        for state, answer in zip(part, captions(llm, [render(state, rng) for state in part]), strict=True):
            read = read_caption(answer)
            for name in FACTS:
                right[name] += read is not None and getattr(read, name) == getattr(state, name)
    return {name: value / count for name, value in right.items()}


def captions(llm: FrozenLLM, pictures: Sequence[Image.Image]) -> list[str]:
    """The LLM's caption of each picture."""
    sampling = Sampling(temperature=0.0, max_new_tokens=32, pictures="none")
    images = [llm.see(picture_tensor(picture)) for picture in pictures]
    prompts = [chat_prompt(llm, caption_turns(image)) for image in images if image is not None]
    return [reply.text for reply in generate(llm, prompts, sampling, [0] * len(prompts))]
