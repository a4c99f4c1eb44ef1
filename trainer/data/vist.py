"""VIST (arXiv 1604.03968) as MiniGPT-5 users have it: stories in one JSON object, and image ids with their files."""

import mmap
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from minigpt5_core.errors import BadInputError

from .records import Broken, Record, Row, Scene
from .rows import Trouble, picture_of, row_of, words_of

MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors write
WANTED = "Give SPLIT_cleaned.json, with SPLIT_image_mapping.json and the pictures beside it, all as UTF-8."
# Lists in each other, with keys or without: deep nesting takes ijson's parser hours. Begun by a set it is found fast.
NESTED = re.compile(rb'[\[{](?:\s*(?:"[^"]{0,40}"\s*:\s*)?[\[{]){99}')
DIGITS = 2000  # so many at once; the parser dies of a number of 4,301 digits, and takes Python with it
DAMAGE = (ijson.JSONError, UnicodeError)


def read_vist(path: Path) -> Iterator[Row]:
    """VIST as MiniGPT-5 users have it: SPLIT_cleaned.json, and SPLIT_image_mapping.json beside it."""
    mapping_file = path.with_name(path.name.replace("_cleaned", "_image_mapping"))
    if mapping_file == path or not mapping_file.is_file():
        raise BadInputError(f"{path} needs {mapping_file.name} beside it. {WANTED}")
    find, last = _files(mapping_file), "the first story"
    with _one_object(path) as file:
        try:
            for key, rows in ijson.kvitems(file, "", use_float=True):
                yield row_of(f"{path.name}:{key}", _vist_story, path, key, rows, find)
                last = key
        except DAMAGE as error:
            yield Broken(
                f"{path.name}: after {last}", f"the JSON is broken, what stands behind is lost: {error}"
            )


def _one_object(path: Path) -> BinaryIO:
    """The open file, to be read from where its JSON object begins."""
    file = path.open("rb")
    try:
        start = len(MARK) if file.read(len(MARK)) == MARK else 0
        file.seek(start)
        if file.read(1000).lstrip()[:1] != b"{":
            raise BadInputError(f"{path} does not begin as one JSON object. {WANTED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_harmless(path, content)
    except BaseException:
        file.close()
        raise
    file.seek(start)
    return file


def _check_harmless(path: Path, content: mmap.mmap) -> None:
    trouble, nested = "", NESTED.search(content)
    if any(content[at : at + DIGITS].isdigit() for at in range(0, len(content) - DIGITS, DIGITS)):
        trouble = "a number of thousands of digits"
    elif nested:
        trouble = f"lists in each other a hundred deep, {nested.start():,} bytes from its beginning"
    if trouble:
        raise BadInputError(f"{path} holds {trouble}; no story needs that. {WANTED}")


def _files(mapping: Path) -> Callable[[str], str | None]:
    """Finds the file of an image id, in a database on disk: there may be five times as many as stories."""
    database = sqlite3.connect("", check_same_thread=False)  # goes with this process
    database.execute("create table files (id text primary key, name text) without rowid")
    with _one_object(mapping) as file:
        try:
            rows = ((key, name if isinstance(name, str) else "") for key, name in ijson.kvitems(file, ""))
            database.executemany("insert or replace into files values (?, ?)", rows)
        except DAMAGE as error:
            raise BadInputError(f"{mapping} cannot be read: {error}.") from error

    def find(identity: str) -> str | None:
        row = database.execute("select name from files where id = ?", (identity,)).fetchone()
        return row[0] if row else None

    return find


def _vist_story(path: Path, key: str, rows: Any, find: Callable[[str], str | None], where: str) -> Record:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Trouble("expected a list of {caption, image_id, sequence_index}")
    scenes = []
    for row in sorted(rows, key=_place):
        if (name := find(identity := str(row.get("image_id")))) is None:
            raise Trouble(f"image id {identity} has no file in the mapping")
        scenes.append(Scene(words_of(row.get("caption"), "caption"), picture_of(path.parent, name)))
    return Record(key, tuple(scenes), where)


def _place(row: dict[str, Any]) -> float:
    """Where in its story a row stands; all that say nothing of it stand as they come."""
    place = row.get("sequence_index", 0)
    if isinstance(place, bool) or not isinstance(place, (int, float)) or place != place:
        raise Trouble(f"its sequence_index is {place!r:.80}, expected a number")
    return place
