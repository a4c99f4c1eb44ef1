"""The benchmark's report as a page: table with intervals, plots, stories side by side. Every text is escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .storybook.stories import TrueScene

SHOWN_STORIES = 8
PLOTTED = ("hero_unnamed", "prop_carried", "place", "time", "consistency", "image_similarity")
BAR, GAP, LABEL, WIDTH = 20, 6, 150, 320  # of a plot, in pixels


def write_report(out: Path, report: dict, told: Sequence[Sequence[TrueScene]]) -> None:
    """Writes `report.html` beside `pictures/`, whose strips it shows."""
    settings = report["settings"]
    parts = [
        "<h1>Vokens beside the two-stage pipeline</h1>",
        f"<p>{len(told)} held-out stories with {settings['scenes']} scenes in all, seed {settings['seed']}, "
        f"{settings['steps']} steps, guidance {settings['guidance']:g}. Their sentences are given to every row. In "
        "small print: 95 % interval by bootstrap over stories.</p>",
        _table(report["rows"]),
        "<h2>Plots</h2><div class=plots>",
        *(_plot(column, report["rows"]) for column in PLOTTED),
        "</div><h2>Stories</h2>",
        *(_story(number, story, list(report["rows"])) for number, story in enumerate(told[:SHOWN_STORIES])),
    ]
    (out / "report.html").write_text(_PAGE.format(style=_STYLE, body="\n".join(parts)), encoding="utf-8")


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


def _story(number: int, story: Sequence[TrueScene], names: list[str]) -> str:
    sentences = "".join(f"<td>{escape(scene.text)}</td>" for scene in story)
    strips = [
        f'<tr><th>{escape(name)}</th><td colspan="{len(story)}"><img loading="lazy" alt="{escape(name)}" '
        f'src="pictures/{name}/story_{number:03}.png"></td></tr>'
        for name in ["true", *names]
    ]
    return f"<table class=story><tr><th></th>{sentences}</tr>{''.join(strips)}</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Vokens beside the two-stage pipeline</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --bar: #4a90c2; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; font-size: 12px; } svg text { fill: currentColor; } svg rect { fill: var(--bar); }
svg path { stroke: currentColor; fill: none; }
.story { table-layout: fixed; } .story img { display: block; width: 100%; }
"""
