"""Where training examples come from: the storybook's world, or records of a data set, each turned into LLM turns."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from PIL import Image, ImageOps
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.prompts import Turn
from minigpt5_core.vision import picture_tensor

from .data.cache import CachedFeatures
from .data.records import BrokenPicture, Picture, Record, Scene
from .data.stream import Stream
from .data.tasks import TASKS, Task, Tools
from .showing import shown_turns, told_scenes
from .storybook.render import render
from .storybook.stories import TrueScene, stories
from .storybook.world import State


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


def shown(state: State, chance: random.Random | None = None) -> Shown:
    """A state of the storybook's world, drawn afresh each time."""
    return Shown(state.caption(), lambda own: render(state, own), new_seed(chance) if chance else 0)


def some_shown(llm: FrozenLLM, scenes: Sequence[TrueScene], share: float, draw: random.Random) -> list[Turn]:
    """A story of the world; to an LLM that sees, with pictures in a `share` of the stories."""
    if llm.sees and draw.random() < share:
        return shown_turns(llm, scenes, draw)
    return [Turn(scene.request, scene.text) for scene in scenes]


class StorybookSource:
    """Stories of the storybook's world, whole, with pictures shown in a share of them."""

    def __init__(self, llm: FrozenLLM, count: int, seed: int, shown_share: float) -> None:
        self.llm, self.shown_share = llm, shown_share
        self.told = list(islice(stories(seed), count))

    def draw(self, count: int, chance: random.Random, share: Share = ALL) -> list[Example]:
        drawn = [(scenes, new_seed(chance)) for scenes in chance.sample(self.told, count)]
        return [
            self._example(scenes, random.Random(seed))
            for index, (scenes, seed) in enumerate(drawn)
            if share.has(index)
        ]

    def _example(self, scenes: Sequence[TrueScene], chance: random.Random) -> Example:
        turns = some_shown(self.llm, scenes, self.shown_share, chance)
        return Example(turns, [shown(scene.state, chance) for scene in told_scenes(scenes, turns)])

    def captions(self, count: int) -> list[str]:
        return [scene.caption for scenes in self.told for scene in scenes][:count]

    def state_dict(self) -> dict[str, Any]:
        return {}  # a step's examples follow from the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RecordSource:
    """Records of a data set, each by one of the tasks, drawn by weight.

    A record that its task has no use for is counted in `unused` and the next one is taken. One with a picture that
    cannot be decoded is counted there too, and its batch is one smaller: only the process whose example it is
    decodes it, and what the others are given must not change by that.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        stream: Stream,
        tasks: dict[str, Task],
        shown_share: float = 0.5,
        features: CachedFeatures | None = None,
    ) -> None:
        if unknown := set(tasks) - set(TASKS):
            raise BadInputError(f"tasks: unknown {', '.join(sorted(unknown))}. Known: {', '.join(TASKS)}.")
        if not llm.sees and "understanding" in tasks:
            raise BadInputError(
                "tasks: understanding needs an LLM that sees. Set image_adapter, or leave it out."
            )
        self.llm, self.stream, self.tasks, self.shown_share = llm, stream, tasks, shown_share
        self.features = features
        self.records: Iterator[Record] = iter(stream)
        self.unused = 0

    def draw(self, count: int, chance: random.Random, share: Share = ALL) -> list[Example]:
        examples = []
        for index in range(count):
            turns, scenes, own = self._made(chance)
            if not share.has(index):
                continue
            try:
                examples.append(self._example(turns, scenes, own))
            except BrokenPicture:
                self.unused += 1
        return examples

    def _made(self, chance: random.Random) -> tuple[list[Turn], list[Scene], random.Random]:
        """The next record that its task has a use for, as turns whose pictures are not decoded yet."""
        while True:
            record, own = next(self.records), random.Random(new_seed(chance))
            names = list(self.tasks)
            name = own.choices(names, [self.tasks[name].weight for name in names])[0]
            see = (lambda picture: picture) if self.llm.sees else (lambda picture: None)
            made = TASKS[name](
                record, Tools(own, self.tasks[name].wordings, see, own.random() < self.shown_share)
            )
            if made is not None:
                return *made, own
            self.unused += 1

    def _example(self, turns: list[Turn], scenes: list[Scene], own: random.Random) -> Example:
        seen = [
            replace(turn, image_tokens=self._see(turn.image_tokens))
            if isinstance(turn.image_tokens, Picture)
            else turn
            for turn in turns
        ]
        return Example(seen, [self._shown(scene, new_seed(own)) for scene in scenes])

    def _see(self, picture: Picture) -> Tensor | None:
        kept = self.features.image_tokens(picture) if self.features else None
        return self.llm.see(picture_tensor(picture.open())) if kept is None else kept

    def _shown(self, scene: Scene, seed: int) -> Shown:
        """With the picture decoded, or its latents: a broken one is found out here."""
        picture = scene.picture
        assert picture is not None
        latents = self.features.latents(picture) if self.features else None
        image = picture.open() if latents is None else None
        return Shown(scene.caption or scene.text, lambda own: image or picture.open(), seed, latents)

    def captions(self, count: int) -> list[str]:
        fresh = Stream(self.stream.path, self.stream.layout, self.stream.seed)
        found: list[str] = []
        for record in fresh:
            said = [scene.caption or scene.text for scene in record.scenes if scene.picture]
            found += [text for text in said if text]
            if len(found) >= count or fresh.epoch:
                return found[:count]
        raise AssertionError("a stream does not end")

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "unused": self.unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.unused = state["unused"]
        self.records = iter(self.stream)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The middle square, `side` pixels wide, as the diffusion model was trained on."""
    return (
        image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    )
