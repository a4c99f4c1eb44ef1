"""The ways to illustrate a story whose sentences are given; each draws scene by scene, as a reader would wait for it.

All share LLM, diffusion model, seeds, steps and guidance. Between them differs only what the diffusion model is told.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from minigpt5_core.generate import Prompt, StoryCache, generate
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.mapper import Mapper
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.prompts import Turn
from minigpt5_core.vision import picture_tensor

from ...evaluation.drawing import (
    BLOCK_ONLY,
    Drawing,
    Drawn,
    draw_conditioning,
    draw_prompt,
    voken_states,
)
from ...llm.prefill_cache import caption_ids
from ..models.caption_baseline import CAPTIONING, CLOSE, OPEN, caption_prompt
from ..world.stories import TrueScene

Row = Callable[[Sequence[TrueScene], int], Iterator[Drawn]]


def vokens(
    teller: StoryTeller,
    drawing: Drawing,
    mapper: Mapper | None = None,
    feed_back: bool = True,
) -> Row:
    """Our way: the story so far -> vokens -> mapper. Pictures go back to an LLM that sees."""
    chosen = mapper or teller.mapper

    def draw(scenes: Sequence[TrueScene], seed: int) -> Iterator[Drawn]:
        turns: list[Turn] = []
        cache = StoryCache()
        for index, scene in enumerate(scenes):
            began = time.perf_counter()
            turns.append(Turn(scene.request, scene.text))
            answer = chosen(voken_states(teller.llm, turns, cache))
            picture = draw_conditioning(teller, drawing, answer, chosen.negative(), seed + index)
            if feed_back:
                turns[-1] = Turn(scene.request, scene.text, shown=teller.llm.see(picture_tensor(picture)))
            yield Drawn(picture, len(teller.llm.voken_ids), time.perf_counter() - began)

    return draw


def two_stage(
    teller: StoryTeller, drawing: Drawing, prompts: Callable[[Sequence[TrueScene]], list[str]]
) -> Row:
    """The usual way: a text for each scene goes through the diffusion model's own text encoder."""

    def draw(scenes: Sequence[TrueScene], seed: int) -> Iterator[Drawn]:
        for index, prompt in enumerate(prompts(scenes)):
            began = time.perf_counter()
            picture = draw_prompt(teller, drawing, prompt, seed + index)
            yield Drawn(picture, 0, time.perf_counter() - began)

    return draw


def captioned(teller: StoryTeller, drawing: Drawing, llm: FrozenLLM) -> Row:
    """The strongest rival: an LLM tuned for it writes a full caption behind each sentence, and that is drawn."""

    def draw(scenes: Sequence[TrueScene], seed: int) -> Iterator[Drawn]:
        told: list[Turn] = []
        cache = StoryCache()
        for index, scene in enumerate(scenes):
            began = time.perf_counter()
            reply = generate(llm, [caption_prompt(llm, told, scene)], CAPTIONING, [0], cache)[0]
            told.append(Turn(scene.request, f"{scene.text}{OPEN}{reply.text}{CLOSE}", picture=False))
            picture = draw_prompt(teller, drawing, reply.text, seed + index)
            # the bracket is the caption's mark as [IMG0] is the picture's: both are emitted where nobody forces them
            tokens = len(llm.encode(OPEN)) + len(reply.ids)
            yield Drawn(picture, tokens, time.perf_counter() - began)

    return draw


def sentences(scenes: Sequence[TrueScene]) -> list[str]:
    """Each scene's own sentence, the paper's baseline."""
    return [scene.text for scene in scenes]


def histories(scenes: Sequence[TrueScene]) -> list[str]:
    """The whole story up to each scene; the text encoder reads its first 77 tokens."""
    return [" ".join(scene.text for scene in scenes[: index + 1]) for index in range(len(scenes))]


def true_captions(scenes: Sequence[TrueScene]) -> list[str]:
    """What each picture should show, in full: the ceiling."""
    return [scene.caption for scene in scenes]


def caption_states(llm: FrozenLLM, caption: str) -> torch.Tensor:
    """(1, V, L) for a caption by itself, as in stage 1."""
    return generate(llm, [Prompt(caption_ids(llm, caption))], BLOCK_ONLY, [0])[0].voken_states


def single(teller: StoryTeller, drawing: Drawing) -> dict[str, Row]:
    """The ways to draw captions that stand by themselves: no story, each its own."""

    def by_vokens(scenes: Sequence[TrueScene], seed: int) -> Iterator[Drawn]:
        for index, scene in enumerate(scenes):
            began = time.perf_counter()
            answer = teller.mapper(caption_states(teller.llm, scene.caption))
            picture = draw_conditioning(teller, drawing, answer, teller.mapper.negative(), seed + index)
            yield Drawn(picture, len(teller.llm.voken_ids), time.perf_counter() - began)

    return {"vokens": by_vokens, "oracle": two_stage(teller, drawing, true_captions)}
