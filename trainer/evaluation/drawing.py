"""Draws one picture from conditioning or from a text, and gets the voken states that conditioning is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.diffusion import prompt_arguments
from minigpt5_core.generate import Prompt, Sampling, StoryCache, generate, seeded_generator
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story.prompts import Turn, chat_prompt
from minigpt5_core.vokens import block_starts

BLOCK_ONLY = Sampling(pictures="first", max_new_tokens=1)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, the same for all rows. `picture_size` is in pixels (0: the model's own)."""

    steps: int
    guidance: float
    picture_size: int = 0


@dataclass(frozen=True)
class Drawn:
    """One scene's picture, how many tokens the LLM emitted for it, and how long all took, in seconds.

    `text` is what the LLM wrote, where the text was not given.
    """

    picture: Image.Image
    llm_tokens: int
    seconds: float
    text: str = ""


def voken_states(llm: FrozenLLM, turns: Sequence[Turn], cache: StoryCache | None = None) -> torch.Tensor:
    """(1, V, L) of the last turn, whose text is given: the story is read up to there and its block is run."""
    prompt = chat_prompt(llm, turns)
    start = block_starts(prompt.ids, llm.voken_ids)[-1]
    read = Prompt(prompt.ids[:start], prompt.images, prompt.image_id)
    return generate(llm, [read], BLOCK_ONLY, [0], cache)[0].voken_states


def draw_conditioning(
    teller: StoryTeller, drawing: Drawing, positive: Conditioning, negative: Conditioning, seed: int
) -> Image.Image:
    """One picture from conditioning."""
    return _draw(teller, drawing, seed, **prompt_arguments(positive, negative, teller.diffusion.dtype))


def draw_prompt(teller: StoryTeller, drawing: Drawing, prompt: str, seed: int) -> Image.Image:
    """One picture from a text."""
    return _draw(teller, drawing, seed, prompt=prompt, negative_prompt="")


@torch.no_grad()
def _draw(teller: StoryTeller, drawing: Drawing, seed: int, **told: object) -> Image.Image:
    return teller.diffusion(
        **told,
        height=drawing.picture_size or None,
        width=drawing.picture_size or None,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        generator=seeded_generator(seed),
    ).images[0]
