"""What an evaluation's pictures come to: columns scene by scene, and the report with its intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from PIL import Image

from minigpt5_core.metrics import Interval, bootstrap, frechet_distance

from ...common.images import to_tensor
from ...evaluation.drawing import DrawnScene
from ...evaluation.table import Cell, cell
from ...metrics.distances import resampled
from ..models.scorer import Scorer
from ..world.state import FACTS, State
from ..world.stories import TrueScene
from .identity import identity

COLUMNS = (
    "hero", "prop", "place", "time", "hero_named", "hero_unnamed", "prop_named", "prop_carried", "consistency",
    "identity", "image_similarity", "fid", "seconds_per_scene", "llm_tokens_per_scene",
    "caption_hero", "caption_prop", "caption_place", "caption_time",
)  # fmt: skip
LEAST_FOR_FID = 400  # pictures a side


@dataclass(frozen=True)
class Measured:
    """What a system's pictures came to: values by column, one a scene, NaN where undefined; features (N, D)."""

    values: dict[str, np.ndarray]
    features: np.ndarray


def measure(
    scorer: Scorer,
    true_stories: list[list[TrueScene]],
    drawn: list[list[DrawnScene]],
    true_features: np.ndarray,
) -> Measured:
    """Every column that has a value for each scene; `true_features` (N, D) are of what it should show."""
    scenes = [scene for story in true_stories for scene in story]
    flat = [scene for story in drawn for scene in story]
    pictures = [scene.picture for scene in flat]
    seen, features = scorer.read(pictures), features_of(scorer, pictures)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(true_features, axis=1)
    values = scene_facts(scenes, seen) | {
        "consistency": _consistency([len(story) for story in true_stories], seen),
        "identity": _identities(true_stories, pictures, seen),
        "image_similarity": (features * true_features).sum(1) / lengths,
        "seconds_per_scene": np.array([scene.seconds for scene in flat]),
        "llm_tokens_per_scene": np.array([float(scene.llm_tokens) for scene in flat]),
    }
    return Measured(values, features)


def scene_facts(scenes: Sequence[TrueScene], seen: Sequence[State]) -> dict[str, np.ndarray]:
    """By column, whether each fact is right, 1 or 0 a scene (N,).

    Of heroes and props also apart where the sentence names them and where it does not, NaN elsewhere.
    """
    right = {fact: facts_right([scene.state for scene in scenes], seen, fact) for fact in FACTS}
    named = np.array([scene.names_kind for scene in scenes])
    prop_named = np.array([scene.names_prop for scene in scenes])
    carried = np.array([scene.state.prop is not None and not scene.names_prop for scene in scenes])
    return right | {
        "hero_named": np.where(named, right["hero"], np.nan),
        "hero_unnamed": np.where(named, np.nan, right["hero"]),
        "prop_named": np.where(prop_named, right["prop"], np.nan),
        "prop_carried": np.where(carried, right["prop"], np.nan),
    }


def facts_right(true: Sequence[State], seen: Sequence[State], fact: str) -> np.ndarray:
    """1 where the scorer reads the true fact, else 0."""
    return np.array([float(getattr(a, fact) == getattr(b, fact)) for a, b in zip(true, seen, strict=True)])


def _consistency(lengths: Sequence[int], seen: Sequence[State]) -> np.ndarray:
    """For each later scene, whether its picture shows the hero that the story's first picture shows."""
    same = []
    start = 0
    for length in lengths:
        heroes = [state.hero for state in seen[start : start + length]]
        same += [np.nan, *(float(hero == heroes[0]) for hero in heroes[1:])]
        start += length
    return np.array(same)


def _identities(
    true_stories: list[list[TrueScene]], pictures: Sequence[Image.Image], seen: Sequence[State]
) -> np.ndarray:
    """Likeness of each story's hero to its first appearance."""
    values: list[float] = []
    for story in true_stories:
        part = slice(len(values), len(values) + len(story))
        hero = story[0].state.hero
        values += identity(pictures[part], hero, [state.hero == hero for state in seen[part]])
    return np.array(values)


@torch.no_grad()
def features_of(scorer: Scorer, pictures: list[Image.Image]) -> np.ndarray:
    """(N, D) in the scorer's feature space."""
    parts = [pictures[first : first + 64] for first in range(0, len(pictures), 64)]
    return torch.cat([scorer.features(to_tensor(part)) for part in parts]).double().numpy()


def single_facts(
    scorer: Scorer, singles: list[list[TrueScene]], drawn: list[list[DrawnScene]]
) -> dict[str, np.ndarray]:
    """For captions by themselves, whether each fact is right."""
    states = [scene.state for sheet in singles for scene in sheet]
    seen = scorer.read([scene.picture for sheet in drawn for scene in sheet])
    return {f"caption_{fact}": facts_right(states, seen, fact) for fact in FACTS}


def summarise(
    true_stories: list[list[TrueScene]],
    measured: dict[str, Measured],
    true_features: np.ndarray,
    singles: dict[str, dict[str, np.ndarray]],
) -> dict:
    """The report: every column of every system with its interval, and the differences between systems.

    Intervals are over stories, those of single captions over captions.
    """
    groups = np.repeat(np.arange(len(true_stories)), [len(story) for story in true_stories])
    rows: dict[str, dict] = {}
    for name, system in measured.items():
        cells = _cells(system.values, groups) | _cells(singles.get(name, {}))
        cells["fid"] = cell(_frechet_interval(system.features, true_features, groups))
        rows[name] = {column: cells.get(column) for column in COLUMNS}
    differences: dict[str, dict] = {}
    for one, other in combinations(measured, 2):
        cells = _cells(_differences(measured[one].values, measured[other].values), groups)
        cells |= _cells(_differences(singles.get(one, {}), singles.get(other, {})))
        differences[f"{one}-{other}"] = {column: cells.get(column) for column in COLUMNS}
    return {"rows": rows, "differences": differences}


def _cells(values: dict[str, np.ndarray], groups: np.ndarray | None = None) -> dict[str, Cell]:
    """Means with intervals over `groups` (N,); without groups over the values themselves."""
    return {
        column: cell(bootstrap(each, np.arange(len(each)) if groups is None else groups))
        for column, each in values.items()
    }


def _differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scene by scene, of the columns that both have."""
    return {column: one[column] - other[column] for column in one.keys() & other.keys()}


def _frechet_interval(features: np.ndarray, true: np.ndarray, groups: np.ndarray) -> Interval | None:
    """Fréchet distance to the true pictures' features, both (N, D); None for fewer than LEAST_FOR_FID pictures."""
    if len(features) < LEAST_FOR_FID:
        return None
    return resampled(frechet_distance, [(features, groups), (true, groups)])
