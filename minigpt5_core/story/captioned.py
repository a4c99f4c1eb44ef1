"""Texts that a mapper learns from: captions, and stories with a caption a scene, a line each. No torch.

    a fox in the snow by day                          a caption by itself

    Mia the fox wakes up. | a fox in the snow by day  a scene: what is told, then what its picture shows
    Go on. | She walks on. | a fox on the beach       what the reader asks for, told, shown

An empty line ends a story. A line of the data format `jsonl` is a story too.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..texts import encoding_of, parse_json

BAR = "|"
CAPTIONED = "captioned.txt.gz"  # in the storybook's folder: its own captions and stories


@dataclass(frozen=True)
class CaptionedScene:
    """What a reader asks for (empty: what happens next), what is told, and what the picture shows (empty: none)."""

    request: str
    text: str
    caption: str


CaptionedStory = tuple[CaptionedScene, ...]


def read_captioned(lines: Iterable[str]) -> Iterator[CaptionedStory]:
    """The stories among the lines, and each caption by itself as a story of one scene, in their order.

    No more than a story is held. BadInputError, with its number, for a line that is none of these.
    """
    story: list[CaptionedScene] = []
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("\ufeff")
        if BAR in line and not line.startswith("{"):
            story.append(_scene(line, number))
            continue
        if story:
            yield tuple(story)
            story = []
        if line.startswith("{"):
            yield _of_json(line, number)
        elif line:
            yield (CaptionedScene(line, "", line),)
    if story:
        yield tuple(story)


def open_captioned(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or with gzip; BadInputError for one that cannot be read."""
    try:
        with open(path, "rb") as file, gzip.open(file) if path.suffix == ".gz" else file as plain:
            yield from io.TextIOWrapper(plain, encoding=encoding_of(plain.peek(4)[:4]), errors="replace")
    except (OSError, EOFError, zlib.error) as error:
        raise BadInputError(f"{path.name} cannot be read: {error}. Copy it again.") from error


def as_lines(story: CaptionedStory) -> Iterator[str]:
    """The lines of a story, as `read_captioned` reads them."""
    for scene in story:
        if scene.request == scene.caption and not scene.text:
            yield scene.caption
        else:
            asked = [scene.request] if scene.request else []
            yield f" {BAR} ".join((*asked, scene.text, scene.caption))
    if len(story) > 1 or story[0].text:
        yield ""


def _scene(line: str, number: int) -> CaptionedScene:
    parts = [part.strip() for part in line.split(BAR)]
    if len(parts) > 3 or not (parts[-1] or parts[-2]):
        raise BadInputError(
            f"Line {number} of the texts is {line!r:.120}. Expected: text {BAR} caption, or: request {BAR} text {BAR} "
            "caption; or a caption without a bar."
        )
    return CaptionedScene(parts[0] if len(parts) == 3 else "", parts[-2], parts[-1])


def _of_json(line: str, number: int) -> CaptionedStory:
    """`{"items": [{"text": ..}, {"caption": ..}, ..]}`, a picture's caption too."""
    try:
        items = parse_json(line)["items"]
        line.encode()  # a story for the LLM has no half characters
        return tuple(_scenes_of(items))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"Line {number} of the texts begins with a brace, but is no story: {line!r:.120}. Expected "
            '{"items": [{"text": ..}, {"caption": ..}, ..]}, or a line without braces.'
        ) from error


def _scenes_of(items: list[dict[str, Any]]) -> Iterator[CaptionedScene]:
    asked, told = "", ""
    for item in items:
        text, caption = item.get("text", ""), item.get("caption", "")
        if item.get("speaker") == "user":
            asked = text
        elif caption:
            yield CaptionedScene(asked, told.strip(), caption.strip())
            asked, told = "", ""
        elif text:
            if told:
                yield CaptionedScene(asked, told.strip(), "")
                asked = ""
            told = text
    if told:
        yield CaptionedScene(asked, told.strip(), "")
