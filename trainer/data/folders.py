"""A plain folder of pictures, each with its caption in a file of the same name; or all captions in one file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import printable, text_of

from .records import Broken, Picture, Record, Row, Scene
from .rows import (
    CAPTIONS,
    PICTURES,
    Cells,
    Trouble,
    captioned,
    cells_of,
    is_hidden,
    json_of,
    lines_of,
    row_of,
    table_of,
    words_of,
)

# Pictures by their name, which are said to be none that is read instead of being passed over.
OTHERS = (
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".eps", ".pdf", ".ico",
)  # fmt: skip


def read_folder(path: Path) -> Iterator[Row]:
    """Pictures, each with its caption in a .txt or .caption of the same name; or all captions in metadata.jsonl or
    metadata.csv. Linked folders are read too; what is hidden is none of the data."""
    if not path.is_dir():
        raise BadInputError(f"{path} is no folder. Give a folder of pictures with their captions.")
    if (path / "metadata.jsonl").is_file():
        yield from _metadata(path, _json_rows(path / "metadata.jsonl"))
    elif (path / "metadata.csv").is_file():
        yield from _metadata(path, _csv_rows(path / "metadata.csv"))
    else:
        yield from _pictures(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in lines_of(path):
        try:
            yield where, json_of(line)
        except Trouble as trouble:
            yield where, trouble


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = table_of(path)
    head = [name.strip() for name in cells_of(next(rows, ("", []))[1])]
    for where, cells in rows:
        yield where, _named(head, cells)


def _named(head: list[str], cells: Cells) -> dict[str, str] | Trouble:
    """The cells by their columns' names; a separator too many in a caption would move the others."""
    if isinstance(cells, Trouble):
        return cells
    if len(cells) > len(head):
        return Trouble(f"it has {len(cells)} columns, expected {len(head)}: {', '.join(head):.200}")
    return dict(zip(head, cells, strict=False))


def _metadata(folder: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[Row]:
    """Rows with `file_name`, and the caption as `text` or `caption`, as `datasets` has them."""
    for where, row in rows:
        yield row_of(where, _of_metadata, folder, row)


def _of_metadata(folder: Path, row: Any, where: str) -> Record:
    if isinstance(row, Trouble):
        raise row
    if not isinstance(row, dict) or "file_name" not in row:
        raise Trouble("expected file_name, and text or caption")
    return captioned(folder, row["file_name"], row.get("text", row.get("caption")), where)


def _pictures(folder: Path) -> Iterator[Row]:
    troubles: list[Broken] = []
    files = sorted(_files(folder, troubles))
    if not any(file.suffix.lower() in (*PICTURES, *OTHERS) for file in files):
        raise BadInputError(
            f"{folder} holds no picture ({', '.join(PICTURES)}), in no folder below it either. Give a folder of "
            "pictures with their captions."
        )
    yield from troubles
    for file in files:
        kind, name = file.suffix.lower(), file.relative_to(folder).as_posix()
        if kind in PICTURES:
            yield row_of(name, _with_caption, file)
        elif kind in OTHERS:
            yield Broken(printable(name), f"{kind} is not read; save it as .jpg or .png")


def _files(folder: Path, troubles: list[Broken]) -> Iterator[Path]:
    """All files in and below a folder, links followed, but a folder that is linked more than once read once."""
    seen: set[str] = set()

    def note(error: OSError) -> None:
        troubles.append(
            Broken(printable(str(error.filename)), f"the folder cannot be read: {error.strerror}")
        )

    for place, folders, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden((name,)))
        if real not in seen:
            yield from (Path(place, name) for name in names if not is_hidden((name,)))
        seen.add(real)


def _with_caption(picture: Path, where: str) -> Record:
    named = (
        base.with_name(base.name + suffix)
        for suffix in CAPTIONS
        for base in (picture.with_suffix(""), picture)
    )
    file = next((file for file in named if file.is_file()), None)
    if file is None:
        raise Trouble(f"its caption {picture.with_suffix(CAPTIONS[0]).name} is missing")
    caption = words_of(text_of(file.read_bytes(), "surrogateescape"), "caption")
    return Record(where, (Scene(caption, Picture(where, picture)),), where)
