"""Pictures in the LLM's training data: stories in which some are shown to it, and questions what one shows."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import DESCRIBE, LOOK, Turn

from ...common.images import to_tensor
from .augment import weather
from .render import render
from .state import State
from .stories import TrueScene, change_a_fact, training_state

MISDRAWN = 0.3  # of the pictures shown behind their blocks, the share in which a fact is wrong


def soft_pictures(states: Sequence[State], draw: random.Random) -> Tensor:
    """Fresh renders, some of them soft as a diffusion model's may be, (B, 3, 128, 128) in [-1, 1]."""
    images = to_tensor([weather(render(state, draw), draw) for state in states])
    if draw.random() >= 0.3:
        return images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(draw.getrandbits(48)))
    return images + draw.uniform(0, 0.1) * noise


def see(llm: FrozenLLM, states: Sequence[State], draw: random.Random) -> list[Tensor]:
    """Image tokens (K, W) of a fresh picture of each state, with their gradient where the image encoder is ours."""
    pictures = soft_pictures(states, draw)
    if llm.image_encoder is not None:
        return list(llm.image_encoder(pictures.to(llm.device)))
    shown = (pictures.clamp(-1, 1).movedim(1, -1) + 1) / 2
    return [tokens for picture in shown if (tokens := llm.see(picture)) is not None]


def shown_turns(llm: FrozenLLM, scenes: Sequence[TrueScene], draw: random.Random) -> list[Turn]:
    """A story as it may be met: each picture asked for by vokens, shown as well, or given by the reader.

    It mostly begins with a given picture, half of these without a word; the last scene is always the LLM's own. What
    is shown behind a block may differ from what was asked for, as a diffusion model's work does: the story then goes on
    as it was told.
    """
    given_scenes = [
        draw.random() < (0.6 if index == 0 else 0.15) and index < len(scenes) - 1
        for index in range(len(scenes))
    ]
    drawn = [
        scene.state if given or draw.random() > MISDRAWN else change_a_fact(scene.state, draw)
        for scene, given in zip(scenes, given_scenes, strict=True)
    ]
    images = see(llm, drawn, draw)
    often = draw.random()  # some stories are shown whole, some hardly at all
    turns = []
    for index, (scene, given, image) in enumerate(zip(scenes, given_scenes, images, strict=True)):
        silent = given and draw.random() < 0.5
        request = draw.choice((scene.request, scene.text)) if given else scene.request
        shown = image if given or draw.random() < often else None
        turns.append(
            Turn(
                LOOK if silent and index == 0 else request,
                "" if silent else scene.text,
                picture=not given,
                image_tokens=shown,
            )
        )
    return turns


def told_scenes(scenes: Sequence[TrueScene], turns: Sequence[Turn]) -> list[TrueScene]:
    """The scenes whose pictures vokens ask for, in order."""
    return [scene for scene, turn in zip(scenes, turns, strict=True) if turn.picture]


def caption_turns(image: Tensor, caption: str | None = None) -> list[Turn]:
    """A picture, and the question what it shows."""
    return [Turn(LOOK, "", picture=False, image_tokens=image), Turn(DESCRIBE, caption, picture=False)]


def questions(llm: FrozenLLM, count: int, draw: random.Random) -> list[list[Turn]]:
    """`count` pictures of any state, each with the question and its answer."""
    states = [training_state(draw) for _ in range(count)]
    pairs = zip(states, see(llm, states, draw), strict=True)
    return [caption_turns(image, state.caption()) for state, image in pairs]
