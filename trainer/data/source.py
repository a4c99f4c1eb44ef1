"""What ties a training stage to its data: examples, what their pictures should show, and where both come from."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.prompts import Turn

from .records import Picture


@dataclass(frozen=True)
class Share:
    """Which of a step's examples are this process's: every `world`-th, from the `rank`-th on."""

    rank: int = 0
    world: int = 1

    def has(self, index: int) -> bool:
        return index % self.world == self.rank


ALL = Share()


@dataclass(frozen=True)
class Shown:
    """What a picture should show: its full caption, and the picture itself, which may be drawn anew each time.

    Everything random about it in a step (drawing, noise, timestep, dropout) follows from `seed`, so that it does not
    matter beside which others it stands, or in which process. `latents` (C, h, w) are the picture's, where they are
    kept.
    """

    caption: str
    image: Callable[[random.Random], Image.Image]
    seed: int = 0
    latents: Tensor | None = None


@dataclass(frozen=True)
class Example:
    """One sequence for the LLM, and what each of its voken blocks should show."""

    turns: list[Turn]
    shows: list[Shown]


class Source(Protocol):
    """An endless supply of examples. What it draws follows from `chance` and its own state alone."""

    def draw(self, count: int, chance: random.Random, share: Share = ALL) -> list[Example]:
        """The next `count` examples, of which those of `share` are made and given."""

    def captions(self, count: int) -> list[str]:
        """Up to `count` captions, to take the spread of the text encoder's answers from."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def new_seed(chance: random.Random) -> int:
    """A seed for something that draws by itself from then on."""
    return chance.getrandbits(48)


class Features(Protocol):
    """Answers that were kept: a picture's latents (C, h, w), a caption's conditioning, no batch; None where not."""

    def latents(self, picture: Picture) -> Tensor | None: ...

    def target(self, caption: str) -> Conditioning | None: ...
