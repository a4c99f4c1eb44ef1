"""Reads a whole data set and says what is there, and what is broken and where.

python -m trainer data check PATH --format vist
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..common.images import center_crop, grid
from .formats import read
from .records import Broken, BrokenPicture, Record, Row

SHOWN_BROKEN, SHEET_PICTURES, SHEET_SIZE = 20, 40, 128


@dataclass
class Found:
    """What a data set holds. `broken` are the rows no training can use."""

    rows: int = 0
    scenes: int = 0
    described: int = 0  # pictures of which there is a caption alone
    broken: list[Broken] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    scenes_of_a_row: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    sheet: list[Image.Image] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return sum(self.sizes.values())


def check(path: Path, layout: str, out: Path | None = None) -> Found:
    """Reads and decodes everything, prints a report, and writes it with a contact sheet into `out`."""
    found = Found()
    for row in read(path, layout):
        _count(found, row)
    print(summary(found, path))
    if out is not None:
        _write(found, path, out)
    return found


def _count(found: Found, row: Row) -> None:
    if isinstance(row, Record):
        try:
            pictures = [picture.open() for picture in row.pictures]
        except BrokenPicture as error:
            row = Broken(row.where, str(error))
    if isinstance(row, Broken):
        found.broken.append(row)
        return
    found.rows += 1
    found.scenes += len(row.scenes)
    found.described += sum(scene.described for scene in row.scenes)
    found.scenes_of_a_row[len(row.scenes)] += 1
    found.characters += [len(scene.text) for scene in row.scenes if scene.text]
    found.sizes.update(picture.size for picture in pictures)
    for picture in pictures[: SHEET_PICTURES - len(found.sheet)]:
        found.sheet.append(center_crop(picture, SHEET_SIZE))


def summary(found: Found, path: Path) -> str:
    """The report as text."""
    lines = [f"{path}: {found.rows} rows usable, {len(found.broken)} broken; {found.scenes} scenes"]
    if found.rows:
        lines.append(f"scenes a row: {_spread(list(found.scenes_of_a_row.elements()))}")
        lines.append(f"characters a text: {_spread(found.characters)}")
        sides = [min(size) for size in found.sizes.elements()]
        lines.append(f"pictures: {found.pictures}, shorter side in pixels: {_spread(sides)}")
        if found.described:
            lines.append(f"pictures that are only described: {found.described}")
    lines += [f"broken  {row.where}: {row.why}" for row in found.broken[:SHOWN_BROKEN]]
    if len(found.broken) > SHOWN_BROKEN:
        lines.append(f"... and {len(found.broken) - SHOWN_BROKEN} more broken rows")
    if not found.rows:
        lines.append("Nothing here can be trained on.")
    return "\n".join(lines)


def _spread(values: Iterable[int]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "none"
    return f"{ordered[0]} to {ordered[-1]}, half of them at most {ordered[len(ordered) // 2]}"


def _write(found: Found, path: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if found.sheet:
        grid(found.sheet, 8).save(out / "contact_sheet.png")
    report = {
        "rows": found.rows,
        "scenes": found.scenes,
        "pictures": found.pictures,
        "described": found.described,
        "broken": [{"where": row.where, "why": row.why} for row in found.broken],
        "picture_sizes": [[*size, count] for size, count in found.sizes.most_common()],
    }
    (out / "check.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (out / "check.txt").write_text(summary(found, Path(path.name)) + "\n", encoding="utf-8")
