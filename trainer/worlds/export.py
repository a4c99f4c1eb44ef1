"""Writes a world's stories as our JSON Lines: texts and, in place of pictures, true captions.

python -m trainer world FILE.toml --stories 1500 --out stories.jsonl
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from minigpt5_core.errors import BadInputError

from .tell import WorldScene, stories
from .world import World

SHOWN = 3  # stories, where no file is asked for


def write_stories(world: World, count: int, out: Path, seed: int = 0, split: str = "train") -> None:
    """Writes `count` of the world's stories to `out`, a line each; the file is there whole or not at all.

    BadInputError for a file that is there already, a folder that is not, or a split without stories.
    """
    if count < 1:
        raise BadInputError(f"stories is {count}; it must be 1 or more.")
    if out.exists():
        raise BadInputError(f"{out} is there already. Name a new file, or take it away first.")
    told = enumerate(islice(stories(world, seed, split), count))
    write_lines(out, (story_line(world, f"{number:05}", scenes) for number, scenes in told))


def story_line(world: World, name: str, scenes: Sequence[WorldScene]) -> str:
    """A story as a line of JSON: what the reader asks, what is told, what the picture would show; see `data/`."""
    told = [(scene.request, scene.text, world.caption_of(scene.state)) for scene in scenes]
    return captioned_line(name, told)


def captioned_line(name: str, scenes: Iterable[tuple[str, str, str]]) -> str:
    """A line of JSON from (request, text, caption) of each scene."""
    items: list[dict[str, str]] = []
    for request, text, caption in scenes:
        items += [{"text": request, "speaker": "user"}, {"text": text}, {"caption": caption}]
    return json.dumps({"id": name, "items": items}, ensure_ascii=False)


def write_lines(out: Path, lines: Iterable[str]) -> None:
    """Writes lines beside `out` and moves the whole file into place; BadInputError where nothing can be written."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        draft.replace(out)
    except OSError as error:
        raise BadInputError(f"{out} cannot be written: {error.strerror}. Name another file.") from error
    finally:
        with suppress(OSError):  # moved, or never there
            draft.unlink()


def summary(world: World, seed: int = 0, split: str = "train") -> Iterator[str]:
    """What there is in a world, and its first stories, line by line."""
    held_out = [world.holds_out(state) for state in world.combinations()]
    counts = ", ".join(
        f"{len(getattr(world, name))} {name}" for name in ("heroes", "props", "places", "times")
    )
    yield f"{counts}, {len(world.companions)} companions"
    yield f"{sum(held_out)} of {len(held_out)} combinations of hero, prop and place held out"
    for scenes in islice(stories(world, seed, split), SHOWN):
        yield ""
        for scene in scenes:
            yield f"{scene.text}  [{world.caption_of(scene.state)}]"
