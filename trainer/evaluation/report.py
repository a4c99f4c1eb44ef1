"""An evaluation's report as a page: table with intervals, plots, stories side by side. Every text is escaped."""

import csv
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minigpt5_core.story import Scene, Story
from minigpt5_core.story.pages import BACKGROUND, INK, MARGIN, draw_strip

from ..common.html_page import page
from ..common.images import grid
from .gallery import Gallery

SHOWN_STORIES = 8
COMPARED = {  # in `three_ways.png`, from top to bottom
    "vokens": "vokens: the story so far",
    "two_stage": "two-stage: the sentence alone is drawn",
    "oracle": "oracle: the true full caption is drawn",
}
PLOTTED = (
    "clip_i", "dino_i", "clip_t", "mm_relevance", "sentence_bert", "rouge_l",
)  # fmt: skip
BAR, GAP, LABEL, WIDTH = 20, 6, 150, 320  # of a plot, in pixels


def write_report(
    out: Path,
    report: dict,
    introduction: str,
    texts: Sequence[Sequence[str]],
    captions: Sequence[str] = (),
    plotted: Sequence[str] = PLOTTED,
) -> None:
    """Writes `report.json`, `report.html` with what it shows (`report/`), `report.md`, `report.csv`, `three_ways.png`.

    `introduction` says what was measured; `texts` are the stories' sentences, scene by scene; `captions` those of the
    first sheet of single captions; `plotted` the columns from 0 to 1 that tell most. The pictures are read from
    `out/pictures`. The last file takes all systems of COMPARED.
    """
    rows = report["rows"]
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.html").write_text(
        _page(out, report, introduction, texts, captions, plotted), encoding="utf-8"
    )
    (out / "report.md").write_text(as_markdown(rows), encoding="utf-8")
    _write_csv(out / "report.csv", rows)
    if all(name in rows for name in COMPARED):
        _three_ways(out, texts[0]).save(out / "three_ways.png", optimize=True)


def _page(
    out: Path,
    report: dict,
    introduction: str,
    texts: Sequence[Sequence[str]],
    captions: Sequence[str],
    plotted: Sequence[str],
) -> str:
    rows = report["rows"]
    parts = [
        "<h1>Vokens beside the two-stage pipeline</h1>",
        f"<p>{escape(introduction)} In small print: 95 % interval by bootstrap over stories.</p>",
        _table(rows),
        "<h2>Plots</h2><div class=plots>",
        *(_plot(column, rows) for column in plotted if any(cells.get(column) for cells in rows.values())),
        "</div>",
        _reasons(report.get("reasons", {})),
        _ahead(report["differences"]),
        "<h2>Stories</h2><p>The first ones, nothing chosen; <i>true</i> is what each picture should show.</p>",
        *(_story(out, number, story, rows) for number, story in enumerate(texts[:SHOWN_STORIES])),
        _captions(out, captions),
    ]
    return page("Vokens beside the two-stage pipeline", "\n".join(parts), _STYLE)


def _write_csv(path: Path, rows: dict[str, dict]) -> None:
    """A line for each row and column with a value."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "column", "mean", "low", "high"))
        for name, cells in rows.items():
            writer.writerows((name, column, *cell.values()) for column, cell in cells.items() if cell)


def as_markdown(rows: dict[str, dict]) -> str:
    """The table of means with intervals, a line for each column of the report that has a value."""
    columns = [
        column for column in next(iter(rows.values())) if any(cells[column] for cells in rows.values())
    ]
    lines = [f"| | {' | '.join(rows)} |", f"| --- |{' --- |' * len(rows)}"]
    for column in columns:
        cells = [_plain(cells[column]) for cells in rows.values()]
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain(cell: dict[str, float] | None) -> str:
    return "–" if cell is None else f"{cell['mean']:.3g} ({cell['low']:.3g} to {cell['high']:.3g})"


def _reasons(reasons: dict[str, str]) -> str:
    """Why a column has no value."""
    items = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in reasons.items())
    return f"<h2>What was not measured</h2><ul>{items}</ul>" if items else ""


def _ahead(differences: dict[str, dict]) -> str:
    """The differences of `vokens` to every other row."""
    start = "vokens-"
    rows = {name.removeprefix(start): cells for name, cells in differences.items() if name.startswith(start)}
    if not rows:
        return ""
    head = "<h2>What vokens are ahead by</h2><p>On the same scenes; an interval that holds 0: no difference found.</p>"
    return head + _table(rows)


def _three_ways(out: Path, story: Sequence[str]) -> Image.Image:
    """The first story as each of `COMPARED` draws it, its sentences below."""
    sheets = []
    for number, (name, label) in enumerate(COMPARED.items()):
        scenes = tuple(Scene(text if number == len(COMPARED) - 1 else "") for text in story)
        pictures: list[Image.Image | None] = [*_pictures(out, name, 0)]
        sheets += [_band(label), draw_strip(Story("", 0, scenes), pictures)]
    sheet = Image.new("RGB", (sheets[-1].width, sum(each.height for each in sheets)), BACKGROUND)
    top = 0
    for each in sheets:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


def _band(label: str) -> Image.Image:
    font = ImageFont.load_default(28)
    band = Image.new("RGB", (1200, 48), BACKGROUND)
    ImageDraw.Draw(band).text((MARGIN, 14), label, font=font, fill=INK)
    return band


def _pictures(out: Path, name: str, number: int) -> list[Image.Image]:
    return [scene.picture for scene in Gallery(out / "pictures" / name).load(number)]


def _strip_file(out: Path, name: str, number: int) -> str:
    """Keeps a story's strip, small enough for a page in `report/`; returns where, as the page names it."""
    target = f"report/{name.replace('/', '_')}_{number:03}.webp"
    (out / "report").mkdir(exist_ok=True)
    pictures = _pictures(out, name, number)
    grid(pictures, len(pictures)).save(out / target, quality=85, method=6)
    return target


def _table(rows: dict[str, dict]) -> str:
    columns = list(next(iter(rows.values())))
    head = "".join(f"<th>{escape(name)}</th>" for name in rows)
    lines = [
        f"<tr><th>{escape(column)}</th>{''.join(_cell(cells[column]) for cells in rows.values())}</tr>"
        for column in columns
    ]
    return f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(lines)}</table></div>"


def _cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "<td>–</td>"
    return f"<td>{cell['mean']:.3g}<br><small>{cell['low']:.3g} to {cell['high']:.3g}</small></td>"


def _plot(column: str, rows: dict[str, dict]) -> str:
    """Bars with intervals, from 0 to 1."""
    bars = [
        _bar(index, name, cells[column]) for index, (name, cells) in enumerate(rows.items()) if cells[column]
    ]
    height = len(rows) * (BAR + GAP)
    return (
        f"<figure><figcaption>{escape(column)}</figcaption>"
        f'<svg viewBox="0 0 {LABEL + WIDTH + 50} {height}" role="img" aria-label="{escape(column)}">'
        f"{''.join(bars)}</svg></figure>"
    )


def _bar(index: int, name: str, cell: dict[str, float]) -> str:
    top, middle = index * (BAR + GAP), index * (BAR + GAP) + BAR / 2
    low, high, end = (LABEL + WIDTH * cell[key] for key in ("low", "high", "mean"))
    return (
        f'<text x="{LABEL - 6}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{LABEL}" y="{top}" width="{max(0, end - LABEL):.1f}" height="{BAR}"/>'
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"/>'
        f'<text x="{LABEL + WIDTH + 6}" y="{middle + 4}">{cell["mean"]:.3f}</text>'
    )


def _story(out: Path, number: int, story: Sequence[str], systems: Iterable[str]) -> str:
    """A story's sentences, and below each other what each picture should show and what the systems have drawn."""
    return _strips(story, {name: _strip_file(out, name, number) for name in ("true", *systems)})


def _captions(out: Path, captions: Sequence[str]) -> str:
    """The first sheet of single captions, by the systems that draw them."""
    files = {
        name: _strip_file(out, f"captions/{name}", 0)
        for name in COMPARED
        if (out / "pictures" / "captions" / name).is_dir()
    }
    return f"<h2>Single captions</h2>{_strips(captions, files)}" if files else ""


def _strips(texts: Sequence[str], files: dict[str, str]) -> str:
    """A table: texts in columns, and below each other the strips that show them."""
    heads = "".join(f"<td>{escape(text)}</td>" for text in texts)
    strips = [
        f'<tr><th>{escape(name)}</th><td colspan="{len(texts)}"><img loading="lazy" alt="{escape(name)}" '
        f'src="{file}"></td></tr>'
        for name, file in files.items()
    ]
    return f"<div class=wide><table class=story><tr><th></th>{heads}</tr>{''.join(strips)}</table></div>"


_STYLE = """
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; font-size: 12px; } svg text { fill: currentColor; } svg rect { fill: var(--bar); }
svg path { stroke: currentColor; fill: none; }
.story { table-layout: fixed; width: 100%; min-width: 50rem; } .story th { width: 8rem; }
.story img { display: block; width: 100%; }
"""
