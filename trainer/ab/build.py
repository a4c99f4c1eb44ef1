"""ab build: pairs two systems' stories and lays them into a folder in which no rater can tell which is whose."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.files import whole_folder
from minigpt5_core.inside import named_file
from minigpt5_core.rasters import UNREADABLE, as_seen, open_picture
from minigpt5_core.texts import parse_json, text_in

from .study import PICTURES, STUDY, Item, Pair, Study

LINE = '{"id": "story_000", "items": [{"text": "Mia waits."}, {"picture": "pictures/1.png"}]}'


@dataclass(frozen=True)
class RatedStory:
    """A system's story, and the file and line it was read from."""

    items: list[Item]
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class Built:
    """The study, and how many stories are in both files, in the first alone and in the second alone."""

    study: Study
    common: int
    only_a: int
    only_b: int


def build_study(
    a: Path, b: Path, out: Path, pairs: int = 50, seed: int = 0, names: Sequence[str] | None = None
) -> Built:
    """Writes `out` with study.json and the pictures under neutral names.

    Stories with the same id make a pair; `pairs` of them are drawn. Each system is shown left in half of them. Equal
    arguments give equal bytes. Raises BadInputError for broken input and for a folder with anything in it.
    """
    if pairs < 1:
        raise BadInputError(f"--pairs is {pairs}; expected 1 or more.")
    systems = _names(a, b, names)
    _check_new(out)
    stories = {"a": read_system(a), "b": read_system(b)}
    common = sorted(stories["a"].keys() & stories["b"].keys())
    if not common:
        raise BadInputError(
            f"No id is in both files: {a} has {_some(stories['a'])}, {b} has {_some(stories['b'])}. "
            "Expected the same stories told by both systems, under the same ids."
        )
    study = _write(out, systems, stories, _draw(common, pairs, seed), seed)
    return Built(study, len(common), len(stories["a"]) - len(common), len(stories["b"]) - len(common))


def read_system(path: Path) -> dict[str, RatedStory]:
    """A system's stories by id, from JSON Lines; BadInputError names the line that is wrong."""
    try:
        lines = text_in(path).split("\n")  # splitlines would cut texts at U+2028 too
    except OSError as error:
        raise BadInputError(
            f"{path} cannot be read: {error.strerror}. Expected a file with a story a line."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    stories: dict[str, RatedStory] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, items = _story(line, f"{path}, line {number}")
            if name in stories:
                raise BadInputError(
                    f"{path}, line {number}: id {name!r} was in line {stories[name].line} too."
                )
            stories[name] = RatedStory(items, path, number)
    if not stories:
        raise BadInputError(f"{path} holds no story. Expected lines such as {LINE}")
    return stories


def _story(line: str, where: str) -> tuple[str, list[Item]]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise BadInputError(f"{where}: not valid JSON ({error}). Expected one such as {LINE}") from error
    if not isinstance(values, dict) or not isinstance(values.get("id"), str):
        raise BadInputError(f'{where}: found no text "id". Expected a line such as {LINE}')
    items = values.get("items")
    if not isinstance(items, list) or not items:
        raise BadInputError(
            f'{where}: "items" is {items!r:.60}. Expected a list with at least one, as in {LINE}'
        )
    return values["id"], [_item(item, f"{where}, item {number}") for number, item in enumerate(items, 1)]


def _item(item: Any, where: str) -> Item:
    """The one key that is shown; others ("speaker", "caption") are left out."""
    kinds = [key for key in ("text", "picture") if isinstance(item, dict) and key in item]
    if len(kinds) != 1 or not isinstance(item[kinds[0]], str):
        raise BadInputError(
            f'{where}: found {item!r:.80}. Expected {{"text": ..}} or {{"picture": ..}}, with a text as its value.'
        )
    value = item[kinds[0]]
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadInputError(f"{where}: {value!r:.80} is not valid Unicode. Expected UTF-8 text.")
    return {kinds[0]: value}


def _names(a: Path, b: Path, names: Sequence[str] | None) -> dict[str, str]:
    first, second = names or (a.stem, b.stem)
    if first == second:
        raise BadInputError(f"Both systems are called {first!r}. Name them apart: --names NAME_A NAME_B.")
    return {"a": first, "b": second}


def _check_new(out: Path) -> None:
    """BadInputError unless `out` is new or an empty folder: answers are never written over."""
    if (out / STUDY).exists():
        raise BadInputError(f"{out} already holds a study. Name another folder with --out, or move it away.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInputError(
            f"{out} is there already and is not an empty folder. Name another one with --out."
        )


def _some(stories: dict[str, RatedStory]) -> str:
    names = sorted(stories)
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _draw(common: list[str], pairs: int, seed: int) -> list[tuple[str, str]]:
    """Ids in the study's order, each with the system shown left; both are left equally often, but for an odd one."""
    rng = random.Random(seed)
    chosen = rng.sample(common, min(pairs, len(common)))
    lefts = list(islice(cycle(rng.sample("ab", 2)), len(chosen)))
    rng.shuffle(lefts)
    return list(zip(chosen, lefts, strict=True))


def _write(
    out: Path,
    systems: dict[str, str],
    stories: dict[str, dict[str, RatedStory]],
    drawn: list[tuple[str, str]],
    seed: int,
) -> Study:
    try:
        with whole_folder(out) as draft:
            (draft / PICTURES).mkdir()
            pairs = [
                _pair(draft, f"{number:04}", story, left, {system: stories[system][story] for system in "ab"})
                for number, (story, left) in enumerate(drawn, 1)
            ]
            study = Study(systems, seed, pairs)
            (draft / STUDY).write_bytes(study.to_json().encode())
    except OSError as error:
        raise BadInputError(
            f"Cannot write the study to {out}: {error.strerror}. Name another folder with --out."
        ) from error
    return study


def _pair(draft: Path, name: str, story: str, left: str, sides: dict[str, RatedStory]) -> Pair:
    right = "b" if left == "a" else "a"
    return Pair(
        name,
        story,
        left,
        _copy(draft, f"{name}_left", sides[left]),
        _copy(draft, f"{name}_right", sides[right]),
    )


def _copy(draft: Path, stem: str, story: RatedStory) -> list[Item]:
    """The items of one side, its pictures copied to names that say only pair, side and place."""
    items, count = [], 0
    for item in story.items:
        if "picture" in item:
            count += 1
            target = f"{PICTURES}/{stem}_{count}.png"
            _plain(story, item["picture"]).save(draft / target, "PNG")
            os.utime(draft / target, (0, 0))  # the order of writing says nothing either
            item = {"picture": target}
        items.append(item)
    return items


def _plain(story: RatedStory, name: str) -> Image.Image:
    """A picture's pixels and nothing else: no metadata, no profile, no transparency, the right way up."""
    try:
        path = named_file(story.file.parent, name)
    except BadInputError as error:
        raise BadInputError(f"{story}: picture {error}.") from error
    try:
        with open_picture(path) as picture:
            seen = as_seen(picture)
    except UNREADABLE as error:
        found = "is not there" if not path.exists() else f"cannot be read as a picture ({error})"
        raise BadInputError(
            f"{story}: picture {name!r} {found}: looked for {path}. Expected a path from the folder of "
            f"{story.file.name}."
        ) from error
    plain = Image.new("RGB", seen.size)
    plain.paste(seen)
    return plain
