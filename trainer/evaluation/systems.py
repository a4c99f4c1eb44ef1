"""The evaluation on a data set: systems go on with its stories scene by scene, and are scored against what comes next.

Each scene is told behind the true ones before it, as in the paper: an error does not carry over to later scenes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Reply, Sampling, generate
from minigpt5_core.metrics import bootstrap, bootstrap_difference
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.prompts import NEXT, Turn, fit_prompt
from minigpt5_core.vision import picture_tensor

from ..common.images import fitted
from ..data.formats import read
from ..data.records import BrokenPicture, Record, Scene
from ..metrics.stories import Scene as ScoredScene
from ..metrics.stories import Score, ToldStory
from ..metrics.table import ScoresRecipe, score_stories
from .drawing import Drawing, Drawn, draw_conditioning, draw_prompt, voken_states
from .table import cell

SYSTEMS = ("vokens", "two_stage", "oracle")


@dataclass(frozen=True)
class Chapter:
    """What a system is given for one scene, and the scene itself."""

    turns: list[Turn]
    request: str
    scene: Scene


System = Callable[[Sequence[Chapter], int], Iterator[Drawn]]


def held_records(path: Path, layout: str, count: int) -> list[Record]:
    """The first `count` records that are whole, with a scene that has a picture; the others are counted and said."""
    found: list[Record] = []
    left_out = 0
    for row in read(path, layout):
        if isinstance(row, Record) and _usable(row):
            found.append(row)
        else:
            left_out += 1
        if len(found) == count:
            break
    if left_out:
        print(f"{left_out} rows of {path} are broken or without a picture, and left out")
    if not found:
        raise BadInputError(f"{path}: not one row can be evaluated. python -m trainer data check says why.")
    return found


def _usable(record: Record) -> bool:
    try:
        pictures = [picture.open() for picture in record.pictures]
    except BrokenPicture:
        return False
    return bool(pictures) and any(scene.picture and scene.speaker == "assistant" for scene in record.scenes)


def chapters(teller: StoryTeller, record: Record) -> list[Chapter]:
    """A chapter for each scene that is told: all before it as the LLM would have told it, pictures shown."""
    found: list[Chapter] = []
    turns: list[Turn] = []
    asked = ""
    for scene in record.scenes:
        if scene.speaker == "user":
            asked = scene.text
            continue
        request = asked or NEXT
        found.append(Chapter(list(turns), request, scene))
        shown = teller.llm.see(picture_tensor(scene.picture.open())) if scene.picture else None
        turns.append(Turn(request, scene.text, picture=scene.picture is not None, shown=shown))
        asked = ""
    return found


def true_pictures(story: Sequence[Chapter], side: int) -> list[Drawn]:
    """What each scene's picture should be, at the size that is drawn; white where there is none."""
    pictures = [chapter.scene.picture for chapter in story]
    images = [picture.open() if picture else Image.new("RGB", (side, side), "white") for picture in pictures]
    return [Drawn(fitted(image, side), 0, 0.0) for image in images]


def systems(teller: StoryTeller, drawing: Drawing, sampling: Sampling, write: bool) -> dict[str, System]:
    """The ways to go on. With `write` the LLM writes the texts too; else the true ones are given to every system."""

    def by_vokens(story: Sequence[Chapter], seed: int) -> Iterator[Drawn]:
        for index, chapter in enumerate(story):
            began = time.perf_counter()
            text, tokens = chapter.scene.text, len(teller.llm.voken_ids)
            if write:
                reply = _reply(teller, chapter, sampling, seed + index)
                states, text, tokens = reply.voken_states[:1], reply.text, tokens + len(reply.ids) - 1
            else:
                states = voken_states(teller.llm, [*chapter.turns, Turn(chapter.request, text)])
            answer = teller.mapper(states)
            picture = draw_conditioning(teller, drawing, answer, teller.mapper.negative(), seed + index)
            yield Drawn(picture, tokens, time.perf_counter() - began, text)

    def two_stage(story: Sequence[Chapter], seed: int) -> Iterator[Drawn]:
        words = replace(sampling, pictures="none")
        for index, chapter in enumerate(story):
            began = time.perf_counter()
            reply = _reply(teller, chapter, words, seed + index) if write else None
            text = reply.text if reply else chapter.scene.text
            picture = draw_prompt(teller, drawing, text, seed + index)
            yield Drawn(picture, len(reply.ids) if reply else 0, time.perf_counter() - began, text)

    def oracle(story: Sequence[Chapter], seed: int) -> Iterator[Drawn]:
        for index, chapter in enumerate(story):
            began = time.perf_counter()
            prompt = chapter.scene.caption or chapter.scene.text
            picture = draw_prompt(teller, drawing, prompt, seed + index)
            yield Drawn(picture, 0, time.perf_counter() - began, chapter.scene.text)

    return {"vokens": by_vokens, "two_stage": two_stage, "oracle": oracle}


def _reply(teller: StoryTeller, chapter: Chapter, sampling: Sampling, seed: int) -> Reply:
    room = sampling.max_new_tokens + len(teller.llm.voken_ids)
    fitted = fit_prompt(teller.llm, [*chapter.turns, Turn(chapter.request)], room)
    return generate(teller.llm, [fitted.prompt], sampling, [seed])[0]


def score_systems(
    stories: Sequence[Sequence[Chapter]],
    names: Sequence[str],
    drawn: dict[str, list[list[Drawn]]],
    recipe: ScoresRecipe,
) -> dict:
    """`rows`, `differences` and the `reasons` of columns without a value, as the storybook's report has them."""
    told = {name: _told(stories, names, system) for name, system in drawn.items()}
    reports = {name: score_stories(system, recipe).scores for name, system in told.items()}
    groups = [number for number, story in enumerate(stories) for _ in story]
    rows: dict[str, dict] = {}
    for name, scores in reports.items():
        cells = {metric: cell(score.interval) for metric, score in scores.items()}
        flat = [one for story in drawn[name] for one in story]
        for column, values in {
            "seconds_per_scene": [one.seconds for one in flat],
            "llm_tokens_per_scene": [float(one.llm_tokens) for one in flat],
        }.items():
            cells[column] = cell(bootstrap(np.array(values), np.array(groups)))
        rows[name] = cells
    first = next(iter(reports.values()))
    reasons = {metric: score.reason for metric, score in first.items() if score.reason}
    return {"rows": rows, "differences": _differences(reports, np.array(groups)), "reasons": reasons}


def _told(
    stories: Sequence[Sequence[Chapter]], names: Sequence[str], system: Sequence[Sequence[Drawn]]
) -> list[ToldStory]:
    return [
        ToldStory(
            name,
            tuple(
                ScoredScene(c.scene.text, c.scene.picture.open() if c.scene.picture else None) for c in story
            ),
            tuple(ScoredScene(one.text, one.picture) for one in drawn),
        )
        for name, story, drawn in zip(names, stories, system, strict=True)
    ]


def _differences(reports: dict[str, dict[str, Score]], groups: np.ndarray) -> dict[str, dict]:
    """Of what has a value for each scene or story; a set's distance has none."""
    table: dict[str, dict] = {}
    for one, other in combinations(reports, 2):
        cells: dict[str, dict[str, float] | None] = {}
        for metric, score in reports[one].items():
            first, second = score.values, reports[other][metric].values
            of = groups if score.per == "scene" else np.unique(groups)
            if first is None or second is None:
                cells[metric] = None
            else:
                cells[metric] = cell(bootstrap_difference(first, second, of))
        table[f"{one}-{other}"] = cells
    return table
