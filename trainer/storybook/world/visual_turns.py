"""Pictures in the LLM's training data: stories in which it sees some of them, and questions about a picture."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import DESCRIBE, LOOK, Turn

from ...common.images import to_tensor
from .augment import augment
from .render import render
from .state import State
from .stories import TrueScene, change_a_fact, training_state

WRONG_PICTURE_SHARE = (
    0.3  # of the generated pictures fed back to the LLM, how many differ from the story in a fact
)


def soft_pictures(states: Sequence[State], rng: random.Random) -> Tensor:
    """Fresh renders, some of them blurred or noisy as a diffusion model's may be, (B, 3, 128, 128) in [-1, 1]."""
    images = to_tensor([augment(render(state, rng), rng) for state in states])
    if rng.random() >= 0.3:
        return images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(rng.getrandbits(48)))
    return images + rng.uniform(0, 0.1) * noise


def image_tokens(llm: FrozenLLM, states: Sequence[State], rng: random.Random) -> list[Tensor]:
    """Image tokens (K, W) of a fresh picture of each state, with their gradient where the image encoder is ours."""
    pictures = soft_pictures(states, rng)
    if llm.image_encoder is not None:
        return list(llm.image_encoder(pictures.to(llm.device)))
    images = (pictures.clamp(-1, 1).movedim(1, -1) + 1) / 2
    return [tokens for picture in images if (tokens := llm.see(picture)) is not None]


def interleaved_turns(llm: FrozenLLM, scenes: Sequence[TrueScene], rng: random.Random) -> list[Turn]:
    """A story with pictures: each is generated, generated and fed back as image tokens, or given by the user.

    It mostly begins with a user's picture, half of these without a text; the last scene is always the LLM's own. A
    picture that is fed back may differ from the story, as a diffusion model's may: the text stays the story's.
    """
    from_user = [
        rng.random() < (0.6 if index == 0 else 0.15) and index < len(scenes) - 1
        for index in range(len(scenes))
    ]
    states = [
        scene.state if by_user or rng.random() > WRONG_PICTURE_SHARE else change_a_fact(scene.state, rng)
        for scene, by_user in zip(scenes, from_user, strict=True)
    ]
    images = image_tokens(llm, states, rng)
    fed_back_share = rng.random()  # some stories have all their pictures, some hardly any
    return [
        _turn(scene, index == 0, by_user, image, fed_back_share, rng)
        for index, (scene, by_user, image) in enumerate(zip(scenes, from_user, images, strict=True))
    ]


def _turn(
    scene: TrueScene, first: bool, by_user: bool, image: Tensor, fed_back_share: float, rng: random.Random
) -> Turn:
    silent = by_user and rng.random() < 0.5
    request = rng.choice((scene.request, scene.text)) if by_user else scene.request
    visible = by_user or rng.random() < fed_back_share
    return Turn(
        LOOK if silent and first else request,
        "" if silent else scene.text,
        picture=not by_user,
        image_tokens=image if visible else None,
    )


def scenes_to_generate(scenes: Sequence[TrueScene], turns: Sequence[Turn]) -> list[TrueScene]:
    """The scenes whose pictures are generated from vokens, in order."""
    return [scene for scene, turn in zip(scenes, turns, strict=True) if turn.picture]


def caption_turns(image: Tensor, caption: str | None = None) -> list[Turn]:
    """A picture, and the question what it shows."""
    return [Turn(LOOK, "", picture=False, image_tokens=image), Turn(DESCRIBE, caption, picture=False)]


def questions(llm: FrozenLLM, count: int, rng: random.Random) -> list[list[Turn]]:
    """`count` pictures of any state, each with the question what it shows and its answer."""
    states = [training_state(rng) for _ in range(count)]
    pairs = zip(states, image_tokens(llm, states, rng), strict=True)
    return [caption_turns(image, state.caption()) for state, image in pairs]
