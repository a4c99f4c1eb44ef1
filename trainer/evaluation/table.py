"""A report's table: a row of cells for each system, each cell a mean with its 95 % interval."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np

from minigpt5_core.metrics import Interval, bootstrap, bootstrap_difference

from ..data.records import Scene
from ..metrics.stories import Scene as ScoredScene
from ..metrics.stories import Score, ToldStory
from ..metrics.table import ScoresRecipe, score_stories
from .chapters import Chapter
from .drawing import DrawnScene

Cell = dict[str, float] | None


def cell(interval: Interval | None) -> Cell:
    """An interval as the report holds it: mean, low and high, five places."""
    return None if interval is None else {name: round(value, 5) for name, value in asdict(interval).items()}


def score_systems(
    stories: Sequence[Sequence[Chapter]],
    ids: Sequence[str],
    drawn: dict[str, list[list[DrawnScene]]],
    recipe: ScoresRecipe,
) -> dict:
    """`rows`, `differences` and the `reasons` of columns without a value, as the storybook's report has them.

    `ids` are the stories'; `drawn` has every system's scenes, story by story.
    """
    scores = {
        name: score_stories(_told_stories(stories, ids, system), recipe).scores
        for name, system in drawn.items()
    }
    groups = np.repeat(np.arange(len(stories)), [len(story) for story in stories])
    rows = {name: _row(found, drawn[name], groups) for name, found in scores.items()}
    first = next(iter(scores.values()))
    reasons = {metric: score.reason for metric, score in first.items() if score.reason}
    return {"rows": rows, "differences": _differences(scores, groups), "reasons": reasons}


def _told_stories(
    stories: Sequence[Sequence[Chapter]], ids: Sequence[str], system: Sequence[Sequence[DrawnScene]]
) -> list[ToldStory]:
    """One system's stories beside the true ones, as the metrics take them."""
    return [
        ToldStory(
            name,
            tuple(_true_scene(chapter.scene) for chapter in story),
            tuple(ScoredScene(scene.text, scene.picture) for scene in drawn),
        )
        for name, story, drawn in zip(ids, stories, system, strict=True)
    ]


def _true_scene(scene: Scene) -> ScoredScene:
    return ScoredScene(scene.text, scene.picture.open() if scene.picture else None, scene.described)


def _row(
    scores: dict[str, Score], drawn: Sequence[Sequence[DrawnScene]], groups: np.ndarray
) -> dict[str, Cell]:
    """A system's cells: its scores, and what a scene took."""
    scenes = [scene for story in drawn for scene in story]
    costs = {
        "seconds_per_scene": [scene.seconds for scene in scenes],
        "llm_tokens_per_scene": [float(scene.llm_tokens) for scene in scenes],
    }
    cells = {metric: cell(score.interval) for metric, score in scores.items()}
    return cells | {column: cell(bootstrap(np.array(values), groups)) for column, values in costs.items()}


def _differences(scores: dict[str, dict[str, Score]], groups: np.ndarray) -> dict[str, dict]:
    """Of every pair of systems, what has a value for each scene or story; a set's distance has none."""
    return {
        f"{one}-{other}": {
            metric: _difference(score, scores[other][metric], groups) for metric, score in scores[one].items()
        }
        for one, other in combinations(scores, 2)
    }


def _difference(one: Score, other: Score, groups: np.ndarray) -> Cell:
    if one.values is None or other.values is None:
        return None
    of = groups if one.per == "scene" else np.unique(groups)
    return cell(bootstrap_difference(one.values, other.values, of))
