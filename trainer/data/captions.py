"""Captions without pictures: lines of text, or one column of a table, read row by row whatever its size."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError

from .records import Broken, Record, Row, Scene
from .rows import Trouble, json_of, lines_of, row_of, words_of

COLUMNS = ("caption", "text", "prompt")  # the first of these that is there
AT_ONCE = 1000  # rows of a .parquet


def read_captions(path: Path) -> Iterator[Row]:
    """A caption a row, of a picture that is only described; BadInputError for a file of another kind or column."""
    kind = path.suffix.lower()
    if not path.is_file() or kind not in READERS:
        found = f"is a {kind or 'nameless'} file" if path.is_file() else "is no file"
        raise BadInputError(f"{path} {found}; expected captions in {', '.join(READERS)}.")
    return READERS[kind](path)


def _described(caption: Any, where: str) -> Record:
    return Record(where, (Scene(words_of(caption, "caption"), described=True),), where)


def _txt(path: Path) -> Iterator[Row]:
    for where, line in lines_of(path):
        yield row_of(where, _described, line)


def _jsonl(path: Path) -> Iterator[Row]:
    for where, line in lines_of(path):
        yield row_of(where, _of_object, line)


def _of_object(line: str, where: str) -> Record:
    row = json_of(line)
    name = next((name for name in COLUMNS if isinstance(row, dict) and name in row), None)
    if name is None:
        raise Trouble(f"expected an object with {' or '.join(COLUMNS)}")
    return _described(row[name], where)


def _csv(path: Path) -> Iterator[Row]:
    """As spreadsheets write it: a cell in quotation marks may hold commas and line breaks."""
    return _table(path)


def _tsv(path: Path) -> Iterator[Row]:
    """A tab ends a cell, and captions hold quotation marks as they are."""
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, **layout: Any) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, **layout)
        column = _column(path, next(reader, []))
        while True:
            try:
                cells = next(reader, None)
            except (
                csv.Error
            ) as error:  # a cell of more than 131,072 letters: a quotation mark is never closed
                yield Broken(f"{path.name}:{reader.line_num}", f"it cannot be read: {error}")
                continue
            if cells is None:
                return
            if cells:
                caption = cells[column] if column < len(cells) else ""
                yield row_of(f"{path.name}:{reader.line_num}", _described, caption)


def _parquet(path: Path) -> Iterator[Row]:
    """As `datasets` writes it. Of all columns the one with captions is read, a thousand rows at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = names[_column(path, names)]
            for batch in file.iter_batches(AT_ONCE, columns=[name]):
                for caption in batch.column(0).to_pylist():
                    number += 1
                    yield row_of(f"{path.name}:{number}", _described, caption)
    except (ArrowException, OSError) as error:
        if not number:
            raise BadInputError(f"{path} cannot be read as .parquet ({error}). Copy it again.") from error
        yield Broken(f"{path.name}:{number + 1}", f"the file breaks off: {error}")


def _column(path: Path, names: list[str]) -> int:
    """Which of the columns holds the captions; BadInputError where none does."""
    known = [name.strip().lower() for name in names]
    for name in COLUMNS:
        if name in known:
            return known.index(name)
    found = ", ".join(names)
    raise BadInputError(
        f"{path}: its columns are {found:.200}; expected one that is called {' or '.join(COLUMNS)}."
        if found
        else f"{path} is empty; expected a column {' or '.join(COLUMNS)}, and captions in it."
    )


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
