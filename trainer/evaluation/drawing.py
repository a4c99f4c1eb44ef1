"""Draws one picture from voken states or from a text, and gets the voken states of a story's last turn.

A `System` is one way to illustrate a story: each draws scene by scene, as a reader would wait for it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from PIL import Image

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.diffusion import prompt_arguments
from minigpt5_core.generate import Prompt, Sampling, StoryCache, generate, seeded_generator
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story.prompts import Turn, fit_prompt
from minigpt5_core.vokens import block_starts

BLOCK_ONLY = Sampling(pictures="first", max_new_tokens=1)

Scene = TypeVar("Scene")
SceneOfSystem = TypeVar("SceneOfSystem", contravariant=True)


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn, the same for all systems. `picture_size` is in pixels (0: the model's own)."""

    steps: int
    guidance: float
    picture_size: int = 0


@dataclass(frozen=True)
class DrawnScene:
    """One scene's picture, how many tokens the LLM emitted for it, and how long all took, in seconds.

    `text` is the scene's text, where the system wrote or chose one.
    """

    picture: Image.Image
    llm_tokens: int = 0
    seconds: float = 0.0
    text: str = ""


class System(Protocol[SceneOfSystem]):
    """One way to illustrate a story: its scenes and a seed -> each scene's picture, drawn when it is asked for.

    Scene i, counted from 0, is drawn with the seed plus i.
    """

    def __call__(self, scenes: Sequence[SceneOfSystem], seed: int, /) -> Iterator[DrawnScene]: ...


def scene_by_scene(
    scenes: Sequence[Scene], seed: int, draw: Callable[[Scene, int], tuple[Image.Image, int, str]]
) -> Iterator[DrawnScene]:
    """Each scene as `draw(scene, seed + index)` gives it, a picture, LLM tokens and a text, with the time it took."""
    for index, scene in enumerate(scenes):
        began = time.perf_counter()
        picture, llm_tokens, text = draw(scene, seed + index)
        yield DrawnScene(picture, llm_tokens, time.perf_counter() - began, text)


def voken_states(llm: FrozenLLM, turns: Sequence[Turn], cache: StoryCache | None = None) -> torch.Tensor:
    """(1, V, L) of the last turn, whose text is given: the story is read up to there and its block is run.

    Of a story longer than the LLM reads, the first scene and the latest ones are read, as when it is told.
    """
    prompt = fit_prompt(llm, turns, 0).prompt
    start = block_starts(prompt.ids, llm.voken_ids)[-1]
    read = Prompt(prompt.ids[:start], prompt.images, prompt.image_id)
    return generate(llm, [read], BLOCK_ONLY, [0], cache)[0].voken_states


def draw_vokens(
    teller: StoryTeller, settings: DrawSettings, states: torch.Tensor, seed: int, mapper: Mapper | None = None
) -> Image.Image:
    """One picture from voken states (1, V, L), by the teller's mapper or another of the same voken count and width."""
    chosen = mapper or teller.mapper
    prompts = prompt_arguments(chosen(states), chosen.negative(), teller.diffusion.dtype)
    return _draw(teller, settings, seed, **prompts)


def draw_prompt(teller: StoryTeller, settings: DrawSettings, prompt: str, seed: int) -> Image.Image:
    """One picture from a text, which the diffusion model's own text encoder reads; the negative prompt is empty."""
    return _draw(teller, settings, seed, prompt=prompt, negative_prompt="")


@torch.no_grad()
def _draw(teller: StoryTeller, settings: DrawSettings, seed: int, **prompts: object) -> Image.Image:
    return teller.diffusion(
        **prompts,
        height=settings.picture_size or None,
        width=settings.picture_size or None,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=seeded_generator(seed),
    ).images[0]
