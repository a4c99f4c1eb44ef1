"""Where training examples come from: the storybook's world, or records of a data set, each turned into LLM turns."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from PIL import Image, ImageOps

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.prompts import Turn
from minigpt5_core.vision import picture_tensor

from .data.records import BrokenPicture, Picture, Record
from .data.stream import Stream
from .data.tasks import TASKS, Task, Tools
from .showing import shown_turns, told_scenes
from .storybook.render import render
from .storybook.stories import TrueScene, stories
from .storybook.world import State


@dataclass(frozen=True)
class Shown:
    """What a picture should show: its full caption, and the picture itself, which may be drawn anew each time."""

    caption: str
    image: Callable[[random.Random], Image.Image]


@dataclass(frozen=True)
class Example:
    """One sequence for the LLM, and what each of its voken blocks should show."""

    turns: list[Turn]
    shows: list[Shown]


class Source(Protocol):
    """An endless supply of examples. What it draws follows from `chance` and its own state alone."""

    def draw(self, count: int, chance: random.Random) -> list[Example]: ...

    def captions(self, count: int) -> list[str]:
        """Up to `count` captions, to take the spread of the text encoder's answers from."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def shown(state: State) -> Shown:
    """A state of the storybook's world, drawn afresh each time."""
    return Shown(state.caption(), lambda chance: render(state, chance))


def some_shown(llm: FrozenLLM, scenes: Sequence[TrueScene], share: float, draw: random.Random) -> list[Turn]:
    """A story of the world; to an LLM that sees, with pictures in a `share` of the stories."""
    if llm.image_encoder is not None and draw.random() < share:
        return shown_turns(llm, scenes, draw)
    return [Turn(scene.request, scene.text) for scene in scenes]


class StorybookSource:
    """Stories of the storybook's world, whole, with pictures shown in a share of them."""

    def __init__(self, llm: FrozenLLM, count: int, seed: int, shown_share: float) -> None:
        self.llm, self.shown_share = llm, shown_share
        self.told = list(islice(stories(seed), count))

    def draw(self, count: int, chance: random.Random) -> list[Example]:
        return [self._example(scenes, chance) for scenes in chance.sample(self.told, count)]

    def _example(self, scenes: Sequence[TrueScene], chance: random.Random) -> Example:
        turns = some_shown(self.llm, scenes, self.shown_share, chance)
        return Example(turns, [shown(scene.state) for scene in told_scenes(scenes, turns)])

    def captions(self, count: int) -> list[str]:
        return [scene.caption for scenes in self.told for scene in scenes][:count]

    def state_dict(self) -> dict[str, Any]:
        return {}  # a step's examples follow from the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RecordSource:
    """Records of a data set, each by one of the tasks, drawn by weight.

    A record that no task can use, or with a picture that cannot be decoded, is counted in `unused` and the next one
    is taken.
    """

    def __init__(
        self, llm: FrozenLLM, stream: Stream, tasks: dict[str, Task], shown_share: float = 0.5
    ) -> None:
        if unknown := set(tasks) - set(TASKS):
            raise BadInputError(f"tasks: unknown {', '.join(sorted(unknown))}. Known: {', '.join(TASKS)}.")
        if llm.image_encoder is None and "understanding" in tasks:
            raise BadInputError(
                "tasks: understanding needs an LLM that sees. Set image_adapter, or leave it out."
            )
        self.llm, self.stream, self.tasks, self.shown_share = llm, stream, tasks, shown_share
        self.records: Iterator[Record] = iter(stream)
        self.unused = 0

    def draw(self, count: int, chance: random.Random) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < count:
            example = self._example(next(self.records), chance)
            if example is None:
                self.unused += 1
            else:
                examples.append(example)
        return examples

    def _example(self, record: Record, chance: random.Random) -> Example | None:
        names = list(self.tasks)
        name = chance.choices(names, [self.tasks[name].weight for name in names])[0]
        tools = Tools(chance, self.tasks[name].wordings, self._see, chance.random() < self.shown_share)
        try:
            made = TASKS[name](record, tools)
            if made is None:
                return None
            turns, scenes = made
            return Example(
                turns, [_shown_picture(scene.caption or scene.text, scene.picture) for scene in scenes]
            )
        except BrokenPicture:
            return None

    def _see(self, picture: Picture) -> Any:
        return self.llm.see(picture_tensor(picture.open()))

    def captions(self, count: int) -> list[str]:
        fresh = Stream(self.stream.path, self.stream.layout, self.stream.seed)
        found: list[str] = []
        for record in fresh:
            found += [scene.caption or scene.text for scene in record.scenes if scene.picture and scene.text]
            if len(found) >= count or fresh.epoch:
                return found[:count]
        raise AssertionError("a stream does not end")

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "unused": self.unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.unused = state["unused"]
        self.records = iter(self.stream)


def _shown_picture(caption: str, picture: Picture | None) -> Shown:
    assert picture is not None
    image = picture.open()
    return Shown(caption, lambda chance: image)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The middle square, `side` pixels wide, as the diffusion model was trained on."""
    return (
        image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    )
