"""The systems that illustrate a story whose sentences are given.

All share LLM, diffusion model, seeds, steps and guidance. They differ only in what the diffusion model is given.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.generate import Prompt, StoryCache, generate
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story.prompts import Turn
from minigpt5_core.vision import picture_tensor

from ...evaluation.drawing import (
    BLOCK_ONLY,
    DrawnScene,
    DrawSettings,
    System,
    draw_prompt,
    draw_vokens,
    scene_by_scene,
    voken_states,
)
from ...llm.prefill_cache import caption_ids
from ..models.caption_baseline import CAPTIONING, CLOSE, OPEN, caption_prompt
from ..world.stories import TrueScene


def vokens(
    teller: StoryTeller, settings: DrawSettings, mapper: Mapper | None = None, feed_back: bool = True
) -> System[TrueScene]:
    """Our way: the story so far -> vokens -> mapper, the teller's or another of the same voken count and width.

    With `feed_back` every picture goes back to an LLM that sees, behind its sentence.
    """

    def story(scenes: Sequence[TrueScene], seed: int) -> Iterator[DrawnScene]:
        turns: list[Turn] = []
        cache = StoryCache()

        def draw(scene: TrueScene, seed: int) -> tuple[Image.Image, int, str]:
            turns.append(Turn(scene.request, scene.text))
            states = voken_states(teller.llm, turns, cache)
            picture = draw_vokens(teller, settings, states, seed, mapper)
            if feed_back:
                turns[-1] = Turn(
                    scene.request, scene.text, image_tokens=teller.llm.see(picture_tensor(picture))
                )
            return picture, len(teller.llm.voken_ids), ""

        return scene_by_scene(scenes, seed, draw)

    return story


def two_stage(
    teller: StoryTeller, settings: DrawSettings, prompt: Callable[[Sequence[TrueScene]], str]
) -> System[TrueScene]:
    """The usual way: a text for each scene goes through the diffusion model's own text encoder.

    `prompt` makes it of the story up to and with the scene.
    """

    def story(scenes: Sequence[TrueScene], seed: int) -> Iterator[DrawnScene]:
        prompts = [prompt(scenes[: index + 1]) for index in range(len(scenes))]
        return scene_by_scene(
            prompts, seed, lambda text, seed: (draw_prompt(teller, settings, text, seed), 0, "")
        )

    return story


def caption_baseline(teller: StoryTeller, settings: DrawSettings, llm: FrozenLLM) -> System[TrueScene]:
    """The strongest baseline: an LLM tuned for it writes a full caption behind each sentence, and that is drawn."""

    def story(scenes: Sequence[TrueScene], seed: int) -> Iterator[DrawnScene]:
        turns: list[Turn] = []
        cache = StoryCache()

        def draw(scene: TrueScene, seed: int) -> tuple[Image.Image, int, str]:
            reply = generate(llm, [caption_prompt(llm, turns, scene)], CAPTIONING, [0], cache)[0]
            turns.append(Turn(scene.request, f"{scene.text}{OPEN}{reply.text}{CLOSE}", picture=False))
            # the bracket is the caption's mark as [IMG0] is the picture's: both are emitted where nobody forces them
            tokens = len(llm.encode(OPEN)) + len(reply.ids)
            return draw_prompt(teller, settings, reply.text, seed), tokens, ""

        return scene_by_scene(scenes, seed, draw)

    return story


def sentence(scenes: Sequence[TrueScene]) -> str:
    """The scene's own sentence, the paper's baseline."""
    return scenes[-1].text


def history(scenes: Sequence[TrueScene]) -> str:
    """The whole story up to the scene; the text encoder reads its first 77 tokens."""
    return " ".join(scene.text for scene in scenes)


def true_caption(scenes: Sequence[TrueScene]) -> str:
    """What the picture should show, in full: the ceiling."""
    return scenes[-1].caption


def caption_voken_states(llm: FrozenLLM, caption: str) -> torch.Tensor:
    """(1, V, L) for a caption by itself, as in stage 1."""
    return generate(llm, [Prompt(caption_ids(llm, caption))], BLOCK_ONLY, [0])[0].voken_states


def single_caption_systems(teller: StoryTeller, settings: DrawSettings) -> dict[str, System[TrueScene]]:
    """By name, those that draw captions that stand by themselves: no story, each its own."""

    def draw(scene: TrueScene, seed: int) -> tuple[Image.Image, int, str]:
        states = caption_voken_states(teller.llm, scene.caption)
        return draw_vokens(teller, settings, states, seed), len(teller.llm.voken_ids), ""

    return {
        "vokens": lambda scenes, seed: scene_by_scene(scenes, seed, draw),
        "oracle": two_stage(teller, settings, true_caption),
    }
