"""Captions without pictures: lines of text, or one column of a table, read row by row whatever its size."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError

from .records import Broken, Record, Row, Scene
from .rows import COLUMNS, Cells, Trouble, cells_of, json_of, lines_of, row_of, table_of, words_of

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
    return _table(path)


def _tsv(path: Path) -> Iterator[Row]:
    """Captions hold quotation marks as they are."""
    return _table(path, tabs=True)


def _table(path: Path, tabs: bool = False) -> Iterator[Row]:
    rows = table_of(path, tabs)
    column = _column(path, cells_of(next(rows, ("", []))[1]))
    for where, cells in rows:
        yield row_of(where, _of_cells, column, cells)


def _of_cells(column: int, cells: Cells, where: str) -> Record:
    cells = cells_of(cells)
    return _described(cells[column] if column < len(cells) else "", where)


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
    ".ndjson": _jsonl,
}
