"""What the readers of the formats share: a file's lines, a table's cells, a row's picture, and how a broken row is told
from what ends the reading."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from minigpt5_core.errors import BadInputError
from minigpt5_core.inside import named_file
from minigpt5_core.texts import is_text, open_text, parse_json, printable

from .records import Broken, Picture, Record, Row, Scene

PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
)
CAPTIONS = (".txt", ".caption")  # what image taggers and trainers write
COLUMNS = ("caption", "text", "prompt")  # the first of these that is there
HIDDEN = ("__MACOSX", "@eaDir")  # of archives made on a Mac, and of a Synology's thumbnails
# A row may be of any shape. What a reader has not thought of must not end the reading.
SHAPES = (TypeError, ValueError, LookupError, AttributeError, RecursionError, OverflowError)


class Trouble(Exception):
    """What is wrong with a row, for `Broken.why`."""


def words_of(value: Any, what: str = "text") -> str:
    """The words of a value; Trouble, which calls it `what`, where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise Trouble(f"its {what} is {value!r:.200}, expected words")
    if not is_text(value):
        raise Trouble(f"its {what} is {value!r:.200}, which is no UTF-8 text; save the file as UTF-8")
    return value.strip()


def row_of(where: str, make: Callable[..., Record], *given: Any) -> Row:
    """The record that `make` makes of what is given and `where`, or why there is none."""
    where = printable(where)
    try:
        return make(*given, where)
    except Trouble as trouble:
        return Broken(where, printable(str(trouble)))
    except SHAPES as error:
        return Broken(
            where, printable(f"it is of a shape that is not known ({type(error).__name__}: {error:.200})")
        )


def picture_of(folder: Path, name: Any) -> Picture:
    """The picture that a row names in or below `folder`; Trouble where there is none."""
    if not isinstance(name, str) or not name:
        raise Trouble(f"its picture is {name!r:.200}, expected a file name")
    try:
        path = named_file(folder, name)
        there = path.is_file()
    except BadInputError as error:
        raise Trouble(f"picture {error}") from error
    except OSError as error:  # no name at all, such as one of 300 letters
        raise Trouble(f"picture {name!r:.80} cannot be looked for: {error.strerror}") from error
    if not there:
        raise Trouble(f"picture {name} is missing")
    return Picture(printable(name), path)


def captioned(folder: Path, name: Any, caption: Any, where: str) -> Record:
    """One captioned picture."""
    text = words_of(caption, "caption")
    picture = picture_of(folder, name)
    return Record(picture.name, (Scene(text, picture),), where)


def is_hidden(parts: tuple[str, ...]) -> bool:
    """Whether a path's parts name what is no data: ._1.png, .ipynb_checkpoints/."""
    return any(part in HIDDEN or part.startswith(".") and part.strip(".") for part in parts)


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file; what is no text in a line comes as lone surrogates."""
    _check_file(path)
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix("\ufeff")  # a file behind another one brings its mark along
            if line.strip():
                yield f"{path.name}:{number}", line


Cells = list[str] | Trouble


def table_of(path: Path, tabs: bool = False) -> Iterator[tuple[str, Cells]]:
    """(where, cells) of a table, its head first, empty lines left out; Trouble for a row that cannot be read.

    As spreadsheets write it, with commas or, in many countries, semicolons: a cell in quotation marks may hold
    separators and line breaks. With `tabs` a tab ends a cell, and quotation marks stand for themselves.
    """
    _check_file(path)
    with open_text(path, newline="") as file:
        layout = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": _delimiter(file)}
        reader = csv.reader(file, **layout)
        while True:
            try:
                cells = next(reader, None)
            except (
                csv.Error
            ) as error:  # a cell of more than 131,072 letters: a quotation mark is never closed
                yield f"{path.name}:{reader.line_num}", Trouble(f"it cannot be read: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield f"{path.name}:{reader.line_num}", cells


def cells_of(cells: Cells) -> list[str]:
    """The cells; the trouble is raised."""
    if isinstance(cells, Trouble):
        raise cells
    return cells


def _delimiter(file: TextIO) -> str:
    head = file.readline()
    file.seek(0)
    return max(",;\t", key=head.count)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise BadInputError(f"{path} is no file.")


def json_of(line: str | bytes) -> Any:
    """What a line of JSON says; Trouble where it is not whole."""
    try:
        return parse_json(line)
    except ValueError as error:
        raise Trouble(f"not valid JSON: {error}") from error
