"""Where training examples come from: the storybook's world, or records of a data set, each turned into LLM turns."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.prompts import Turn
from minigpt5_core.vision import picture_tensor

from ..feature_cache.cache import CachedFeatures
from .records import BrokenPicture, Picture, Record, Scene
from .source import ALL, Example, Share, Shown, new_seed
from .stream import Stream
from .tasks import TASKS, Task, Tools


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
            replace(turn, shown=self._see(turn.shown)) if isinstance(turn.shown, Picture) else turn
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
