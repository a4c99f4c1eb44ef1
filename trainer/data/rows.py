"""What the readers of all layouts share: a broken row is said, with where and why, and never ends the reading."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError

from .records import Broken, Record, Row


class Trouble(Exception):
    """What is wrong with a row, for `Broken.why`."""


def words_of(value: Any, what: str = "text") -> str:
    """The words of a value; Trouble, which calls it `what`, where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise Trouble(f"its {what} is {value!r}, expected words")
    return value.strip()


def row_of(where: str, make: Callable[..., Record], *given: Any) -> Row:
    """The record that `make` makes of what is given and `where`, or why there is none."""
    try:
        return make(*given, where)
    except Trouble as trouble:
        return Broken(where, str(trouble))


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file; a line that is not UTF-8 comes with replacement characters."""
    if not path.is_file():
        raise BadInputError(f"{path} is no file.")
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", line


def json_of(line: str) -> Any:
    """What a line of JSON says; Trouble where it is not whole."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Trouble(f"not valid JSON: {error}") from error
