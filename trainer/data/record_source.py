"""Records of a data set in one of the formats, each turned into LLM turns by one of the tasks."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import NEXT, Turn
from minigpt5_core.vision import picture_tensor

from .fitting import fits, fitted
from .formats import read
from .records import BrokenPicture, Picture, Record, Scene
from .source import WHOLE, Example, Features, Passage, PictureTarget, Shard, new_seed
from .stream import Stream
from .tasks import TASKS, Task, Tools

PREVIEWED_CAPTIONS, PREVIEWED_STORIES, PREVIEWED_SCENES = 8, 2, 4
ENOUGH_TRIED = 1000  # records in a row that no task has a use for


class RecordSource:
    """Records of a data set, each by one of the tasks, drawn by weight; a `DataSource`.

    A record that its task has no use for is counted in `unused` and the next one is taken. One with a picture that
    cannot be decoded, or with a turn longer than the LLM reads, is counted there too, and its batch is one smaller:
    only the process whose example it is decodes it, and what the others are given must not change by that. With
    `previews_stories` previews show the first scenes of two stories, else single captions.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        stream: Stream,
        tasks: dict[str, Task],
        shown_share: float = 0.5,
        features: Features | None = None,
        previews_stories: bool = False,
    ) -> None:
        if unknown := set(tasks) - set(TASKS):
            raise BadInputError(f"tasks: unknown {', '.join(sorted(unknown))}. Known: {', '.join(TASKS)}.")
        if not llm.has_vision and "understanding" in tasks:
            raise BadInputError(
                "tasks: understanding needs an LLM that sees. Set image_adapter, or leave it out."
            )
        self.llm, self.stream, self.tasks, self.shown_share = llm, stream, tasks, shown_share
        self.features, self.previews_stories = features, previews_stories
        self.records: Iterator[Record] = iter(stream)
        self.unused = self.too_long = 0
        self.told = False

    @property
    def name(self) -> str:
        """The data set's own name, without its folder."""
        return self.stream.path.name

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """The next `count` records as examples, all with the text loss "text"."""
        examples = []
        for index in range(count):
            turns, scenes, own = self._next_example(rng)
            if not shard.has(index):
                continue
            try:
                example = self._fitted(self._decode(turns, scenes, own), own)
            except BrokenPicture:
                example = None
            examples += [example] if example else []
            self.unused += example is None
        return {"text": examples}

    def _fitted(self, example: Example, own: random.Random) -> Example | None:
        """The example, or what the LLM can read of it; says once that there are such."""
        if fits(self.llm, example.turns):
            self.too_long = 0
            return example
        if not self.told:
            self.told = True
            print(
                f"{self.stream.path.name}: some examples are longer than the {self.llm.context} tokens that the LLM "
                "reads. Of each, the first turn and the latest ones that fit are trained on, as when it tells."
            )
        shorter = fitted(self.llm, example, own)
        self.too_long = 0 if shorter else self.too_long + 1
        if self.too_long >= ENOUGH_TRIED:
            raise BadInputError(
                f"{self.stream.path}: {self.too_long} examples in a row are longer than the {self.llm.context} tokens "
                "that the LLM reads, each by a single turn. Take shorter texts, or an LLM that reads more."
            )
        return shorter

    def _next_example(self, rng: random.Random) -> tuple[list[Turn], list[Scene], random.Random]:
        """The next record that its task has a use for, as turns whose pictures are not decoded yet."""
        begun, tried = self.stream.epoch, 0
        while True:
            record, own = next(self.records), random.Random(new_seed(rng))
            names = list(self.tasks)
            name = own.choices(names, [self.tasks[name].weight for name in names])[0]
            see = (lambda picture: picture) if self.llm.has_vision else (lambda picture: None)
            made = TASKS[name](
                record, Tools(own, self.tasks[name].wordings, see, own.random() < self.shown_share)
            )
            if made is not None:
                return *made, own
            self.unused, tried = self.unused + 1, tried + 1
            if (
                tried >= ENOUGH_TRIED and self.stream.epoch > begun + 1
            ):  # a whole epoch, and many draws of a task
                raise BadInputError(self._nothing_to_draw())

    def _nothing_to_draw(self) -> str:
        return (
            f"{self.stream.path}: the tasks {', '.join(self.tasks)} have no use for any of its records. Pictures are "
            'asked for where the data has one, or describes one (jsonl: {"caption": ..}). python -m trainer data check '
            f"{self.stream.path} --format {self.stream.layout} says what there is; set other tasks."
        )

    def _decode(self, turns: list[Turn], scenes: list[Scene], own: random.Random) -> Example:
        seen = [
            replace(turn, image_tokens=self._see(turn.image_tokens))
            if isinstance(turn.image_tokens, Picture)
            else turn
            for turn in turns
        ]
        return Example(seen, [self._target(scene, new_seed(own)) for scene in scenes])

    def _see(self, picture: Picture) -> Tensor | None:
        kept = self.features.image_tokens(picture) if self.features else None
        return self.llm.see(picture_tensor(picture.open())) if kept is None else kept

    def _target(self, scene: Scene, seed: int) -> PictureTarget:
        """With the picture decoded, or its latents: a broken one is found out here. A described one has neither."""
        if (picture := scene.picture) is None:
            return PictureTarget(scene.shown, None, seed)
        latents = self.features.latents(picture) if self.features else None
        image = picture.open() if latents is None else None
        return PictureTarget(scene.shown, lambda own: image or picture.open(), seed, latents)

    def captions(self, count: int) -> list[str]:
        """Those of the first records of an epoch."""
        fresh = Stream(self.stream.path, self.stream.layout, self.stream.seed)
        found: list[str] = []
        for record in fresh:
            found += _captions(record)
            if len(found) >= count or fresh.epoch:
                return found[:count]
        raise AssertionError("a stream does not end")

    def passages(self) -> list[Passage] | None:
        """None: a data set may be too large to keep all its keys and values."""
        return None

    def previews(self) -> list[list[Turn]]:
        """The data set's first captions, or the first scenes of its first stories."""
        rows = (row for row in read(self.stream.path, self.stream.layout) if isinstance(row, Record))
        if not self.previews_stories:
            alone = ([Turn(text, "")] for record in rows for text in _captions(record))
            return list(islice(filter(self._reads, alone), PREVIEWED_CAPTIONS))
        stories = ([Turn(NEXT, s.text) for s in row.scenes if s.pictured and s.text] for row in rows)
        begun = (turns[:PREVIEWED_SCENES] for turns in stories if turns)
        return list(islice(filter(self._reads, begun), PREVIEWED_STORIES))

    def _reads(self, turns: list[Turn]) -> bool:
        return fits(self.llm, turns)

    def state_dict(self) -> dict[str, Any]:
        """The stream's place, and how many records were of no use so far."""
        return {"stream": self.stream.state_dict(), "unused": self.unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on right behind where `state` was taken."""
        self.stream.load_state_dict(state["stream"])
        self.unused = state["unused"]
        self.records = iter(self.stream)


def _captions(record: Record) -> list[str]:
    """What the record's pictures show, for those of which it is known."""
    return [scene.shown for scene in record.scenes if scene.pictured and scene.shown]
