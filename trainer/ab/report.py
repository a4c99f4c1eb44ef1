"""ab report: what the raters preferred, as ab_report.json and as a page, ab_report.html. Every text is escaped."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path

from minigpt5_core.errors import BadInputError
from minigpt5_core.metrics import Interval

from ..common.html_page import page
from .answers import Answer, read_answers
from .preference import Preference, Strength, prefer
from .study import ANSWERS, QUESTIONS, Study, load_study

FORMAT_VERSION = 1
JSON, HTML = "ab_report.json", "ab_report.html"
WIDTH, BAR = 600, 30  # of a plot, in pixels
NARROW = 0.06  # a share whose number does not fit into its part of the bar


def write_report(folder: Path, out: Path) -> list[Path]:
    """Measures the answers in a study's folder and writes the two files into `out`; returns where they are.

    The same answers give the same bytes. Raises BadInputError when there are no answers.
    """
    study = load_study(folder)
    answers = read_answers(folder)
    _check_known(study, answers, folder)
    preferences = measure(study, answers)
    raters = len({answer.rater for answer in answers})
    texts = {
        JSON: as_json(study, preferences, raters),
        HTML: as_html(study, preferences, raters),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [_write(out / name, text) for name, text in texts.items()]
    except OSError as error:
        raise BadInputError(
            f"Cannot write the report to {out}: {error.strerror}. Name another folder with --out."
        ) from error


def measure(study: Study, answers: list[Answer]) -> dict[str, Preference]:
    """What is preferred, by question; questions without answers are left out."""
    by_question = {key: [answer for answer in answers if answer.question == key] for key in QUESTIONS}
    return {key: prefer(study, found) for key, found in by_question.items() if found}


def as_json(study: Study, preferences: Mapping[str, Preference], raters: int) -> str:
    """The text of ab_report.json; a Bradley-Terry strength of null is infinite, an alpha of null undefined."""
    values = {
        "format_version": FORMAT_VERSION,
        "systems": study.systems,
        "study": study.fingerprint(),
        "pairs": len(study.pairs),
        "raters": raters,
        "questions": {key: asdict(preference) for key, preference in preferences.items()},
    }
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def as_html(study: Study, preferences: Mapping[str, Preference], raters: int) -> str:
    """The page: a bar and a row of numbers for each question."""
    a, b = (escape(study.systems[system]) for system in "ab")
    parts = [
        f"<h1>{a} beside {b}</h1>",
        f"<p>{_many(raters, 'rater')}, {_many(len(study.pairs), 'pair')} of stories. Raters did not know which system "
        f"told which story. In small print: 95 % interval by bootstrap over pairs.</p>",
        f"<p class=key><span class=a>{a} is better</span> <span class=tie>tie</span> "
        f"<span class=b>{b} is better</span></p>",
        *(_plot(QUESTIONS[key][0], preference) for key, preference in preferences.items()),
        _table(a, b, preferences),
        "<h2>How to read it</h2>",
        f"<p>Strength is that of Bradley and Terry: the logarithm of the odds that {a} is preferred to {b}, a tie "
        "counted as half a win for each. Above 0, the first is preferred; an interval that holds 0: no difference "
        "found. Krippendorff's alpha is how far raters agree on the same pairs: 1 fully, 0 as by chance. Nominal: any "
        "two different answers disagree alike. Ordinal: left against right disagrees more than left against tie.</p>",
    ]
    title = f"{study.systems['a']} beside {study.systems['b']}"
    return page(title, "\n".join(parts), _STYLE)


def _check_known(study: Study, answers: list[Answer], folder: Path) -> None:
    known = {pair.name for pair in study.pairs}
    strange = next((answer.pair for answer in answers if answer.pair not in known), None)
    if strange is not None:
        raise BadInputError(
            f"{folder / ANSWERS} has an answer about pair {strange!r}, which the study does not hold. "
            "Put the study and its own answers into one folder."
        )


def _write(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fresh.write_bytes(text.encode())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _plot(title: str, preference: Preference) -> str:
    """One bar from 0 to 1: wins, ties, losses."""
    shares = {system: getattr(preference, system).mean for system in ("a", "tie", "b")}
    label = ", ".join(f"{system} {100 * share:.0f} %" for system, share in shares.items())
    parts, start = [], 0.0
    for system, share in shares.items():
        parts.append(_part(system, start, share))
        start += share
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {BAR}" role="img" '
        f'aria-label="{escape(f"{title}: {label}")}">{"".join(parts)}</svg></figure>'
    )


def _part(system: str, start: float, share: float) -> str:
    middle = WIDTH * (start + share / 2)
    number = (
        f'<text class="{system}" x="{middle:.1f}" y="{BAR / 2 + 5:g}" text-anchor="middle">{100 * share:.0f} %</text>'
        if share >= NARROW
        else ""
    )
    return f'<rect class="{system}" x="{WIDTH * start:.1f}" y="0" width="{WIDTH * share:.1f}" height="{BAR}"/>{number}'


def _table(a: str, b: str, preferences: Mapping[str, Preference]) -> str:
    """`a` and `b` come escaped."""
    heads = ("", a, "tie", b, "strength", "alpha, nominal", "alpha, ordinal", "answers", "raters", "pairs")
    head = "".join(f"<th>{name}</th>" for name in heads)
    lines = [
        f"<tr><th>{escape(QUESTIONS[key][0])}</th>{_cells(each)}</tr>" for key, each in preferences.items()
    ]
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _cells(preference: Preference) -> str:
    cells = [
        *(_percent(share) for share in (preference.a, preference.tie, preference.b)),
        _strength(preference.strength, preference.score),
        *(_number(alpha, "–") for alpha in (preference.alpha_nominal, preference.alpha_ordinal)),
        *(str(count) for count in (preference.answers, preference.raters, preference.pairs)),
    ]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _percent(share: Interval) -> str:
    return f"{100 * share.mean:.1f} %<br><small>{100 * share.low:.1f} to {100 * share.high:.1f}</small>"


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}".replace("-", "−")


def _strength(strength: Strength, score: Interval) -> str:
    mean, low, high = (
        _number(value, "∞" if share else "−∞")
        for value, share in zip(asdict(strength).values(), asdict(score).values(), strict=True)
    )
    return f"{mean}<br><small>{low} to {high}</small>"


_STYLE = """
body { max-width: 60rem; }
td { white-space: nowrap; }
figure { margin: 0.8rem 0; max-width: 40rem; } figcaption { font-weight: 600; }
svg { width: 100%; font-size: 15px; }
rect.a { fill: #1f5fa8; } rect.tie { fill: #b9b7b0; } rect.b { fill: #b3541e; }
text.a, text.b { fill: #fff; } text.tie { fill: #1d1d1b; }
.key span { padding: 0.1rem 0.5rem; margin-right: 0.4rem; }
.key .a { background: #1f5fa8; color: #fff; } .key .tie { background: #b9b7b0; color: #1d1d1b; }
.key .b { background: #b3541e; color: #fff; }
"""
