"""What ties a training stage to its data: examples, what their pictures should show, and where both come from.

A stage knows a `DataSource` and nothing else of its data. The formats are one (`record_source.RecordSource`), the
storybook's world is another (`trainer/storybook/world/source.py`); your own is a class with these few methods.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import Turn

from .records import Picture


@dataclass(frozen=True)
class Shard:
    """Which of a step's examples are this process's: every `world`-th, from the `rank`-th on."""

    rank: int = 0
    world: int = 1

    def has(self, index: int) -> bool:
        """Whether the step's example of this number belongs to this process."""
        return index % self.world == self.rank


WHOLE = Shard()


@dataclass(frozen=True)
class PictureTarget:
    """What a picture should show: its full caption, and the picture itself, which may be drawn anew each time; None for
    a picture that is only described.

    Everything random about it in a step (drawing, noise, timestep, dropout) follows from `seed`, so that it does not
    matter beside which others it stands, or in which process. `latents` (C, h, w) are the picture's, where a feature
    cache has them.
    """

    caption: str
    image: Callable[[random.Random], Image.Image] | None
    seed: int = 0
    latents: Tensor | None = None

    @property
    def at_hand(self) -> bool:
        """Whether there is a picture, and not its caption alone."""
        return self.image is not None or self.latents is not None


@dataclass(frozen=True)
class Example:
    """One sequence for the LLM, and what each of its voken blocks should show, in order."""

    turns: list[Turn]
    targets: list[PictureTarget]


@dataclass(frozen=True)
class Passage:
    """A text as ids, with the places where a picture belongs: (how many ids stand before it, what it shows)."""

    ids: list[int]
    pictures: list[tuple[int, PictureTarget]]


class DataSource(Protocol):
    """Where a stage's examples come from. What it samples follows from `rng` and its own state alone."""

    @property
    def name(self) -> str:
        """What a result's header says it was trained on; never a path, which would say whose machine."""

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """A step's `count` examples and what goes with them, by the name of their text loss.

        Only those of `shard` are made; what the other processes are given must not change by that.
        """

    def captions(self, count: int) -> list[str]:
        """Up to `count` captions, from which the spread of the text encoder's answers is taken."""

    def passages(self) -> list[Passage] | None:
        """Everything there is to read, for a stage whose LLM is frozen, which then computes keys and values once;
        None where it is too much, or drawn afresh each time."""

    def previews(self) -> list[list[Turn]]:
        """What preview pictures are drawn from; none for no previews."""

    def state_dict(self) -> dict[str, Any]:
        """Its place, as JSON can hold it, for a run that goes on later."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on right behind where `state` was taken."""


class Features(Protocol):
    """Answers of frozen models that were kept; None for one that was not."""

    def latents(self, picture: Picture) -> Tensor | None:
        """(C, h, w), scaled."""

    def image_tokens(self, picture: Picture) -> Tensor | None:
        """(K, W), as `FrozenLLM.see` gives them."""

    def target(self, caption: str) -> Conditioning | None:
        """The text encoders' answer, no batch."""


OpenSource = Callable[[FrozenLLM, Features | None], DataSource]
"""Opens a source once the LLM is loaded, for its examples are made of what that LLM can read and see."""


def new_seed(rng: random.Random) -> int:
    """A seed for something that draws by itself from then on."""
    return rng.getrandbits(48)
