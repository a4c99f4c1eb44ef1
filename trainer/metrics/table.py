"""All metrics of a system's stories at once, in one of two modes, with 95 % intervals over stories."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minigpt5_core.errors import BadInputError

from .corrected import correct_scores
from .features import Encoded
from .published import published_scores, published_text
from .recipe import PATHS, ScoresRecipe
from .stories import Scene, Score, ToldStory
from .text import without_marks

__all__ = ["Report", "Scene", "Score", "ScoresRecipe", "ToldStory", "score_stories"]


@dataclass(frozen=True)
class Report:
    """Scores by name, of how much, and the weights they are from."""

    mode: str
    stories: int
    scenes: int
    weights: dict[str, str]
    scores: dict[str, Score]

    def to_dict(self, values: bool = False) -> dict[str, Any]:
        """For JSON: each metric's mean, low and high, or the reason why it has none; `values` adds the single ones."""
        head = {name: getattr(self, name) for name in ("mode", "stories", "scenes", "weights")}
        return head | {"metrics": {name: _cell(score, values) for name, score in self.scores.items()}}


def score_stories(stories: Sequence[ToldStory], recipe: ScoresRecipe) -> Report:
    """Every metric in the recipe's mode; what it has no weights or package for is None, with the way to get them.

    BadInputError for no story, for two of one id, and for weights that are named but are not what they should be.
    Nothing is downloaded.
    """
    _check(stories)
    published = recipe.mode == "published"
    told = Encoded(stories, recipe, published_text if published else without_marks)
    scores = published_scores(told) if published else correct_scores(told)
    weights = {name: getattr(recipe, name) for name in PATHS}
    return Report(recipe.mode, len(stories), len(told.groups), weights, scores)


def _check(stories: Sequence[ToldStory]) -> None:
    if not stories:
        raise BadInputError("There are no stories to score; expected at least one.")
    twice = [name for name, count in Counter(story.id for story in stories).items() if count > 1]
    if twice:
        raise BadInputError(
            f"Story id {twice[0]} occurs more than once; expected an id of its own for each story."
        )


def _cell(score: Score, values: bool) -> dict[str, Any]:
    ends = asdict(score.interval) if score.interval else {"mean": None}
    more = {key: text for key in ("per", "reason", "note") if (text := getattr(score, key))}
    single = [] if score.values is None else score.values.tolist()
    return ends | more | ({"values": [None if np.isnan(one) else one for one in single]} if values else {})
