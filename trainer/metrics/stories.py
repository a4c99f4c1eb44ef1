"""What is scored and what comes out: stories as they should be and as they were told, and a metric's value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.metrics import Interval, bootstrap

from .weights import NotAvailableError


class Scene(NamedTuple):
    """A text (empty where there is none) and a picture; a true one may be only `described`, and be None."""

    text: str
    picture: Image.Image | None = None
    described: bool = False


@dataclass(frozen=True)
class ToldStory:
    """A story or dialogue, scene by scene or turn by turn, as it is in the data and as a system told it."""

    id: str
    true: tuple[Scene, ...]
    predicted: tuple[Scene, ...]

    def __post_init__(self) -> None:
        if not self.true or len(self.true) != len(self.predicted):
            raise BadInputError(
                f"Story {self.id} has {len(self.true)} true and {len(self.predicted)} predicted scenes; expected "
                "equally many, at least one. Where nothing was told or drawn, put Scene('', None)."
            )


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval over stories, or None and the reason.

    per: what each of `values` is for, "scene" (N,) or "story" (S,), NaN where undefined; a "set" has none of its own.
    """

    interval: Interval | None
    per: str
    values: np.ndarray | None = None
    reason: str = ""
    note: str = ""


def by_scene(values: np.ndarray, groups: np.ndarray) -> Score:
    """Values (N,) of scenes that belong to the stories `groups` (N,)."""
    interval = bootstrap(values, groups)
    return Score(interval, "scene", values, "" if interval else "It is undefined for every scene.")


def by_story(values: np.ndarray) -> Score:
    """Values (S,) of stories."""
    interval = bootstrap(values, np.arange(len(values)))
    return Score(interval, "story", values, "" if interval else "It is undefined for every story.")


def story_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean (S,) of each story's defined values, NaN for a story without any."""
    parts = [values[groups == group] for group in np.unique(groups)]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def attempt(metric: Callable[[], Score]) -> Score:
    """The score, or the reason why what it needs is not there."""
    try:
        return metric()
    except NotAvailableError as error:
        return Score(None, "", reason=str(error))


def concatenated(stories: Sequence[ToldStory], side: str) -> list[Scene]:
    """The true or the predicted scenes of all stories in a row."""
    return [scene for story in stories for scene in getattr(story, side)]
