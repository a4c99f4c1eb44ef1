"""What an evaluation's pictures come to: columns scene by scene, and the report with its intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from PIL import Image

from minigpt5_core.metrics import Interval, bootstrap, bootstrap_difference, frechet_distance

from ...common.images import to_tensor
from ...evaluation.drawing import Drawn
from ...evaluation.table import cell
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
    """What a row's pictures came to: values by column, one a scene, NaN where undefined; features (N, D)."""

    values: dict[str, np.ndarray]
    features: np.ndarray


def measure(
    scorer: Scorer, told: list[list[TrueScene]], drawn: list[list[Drawn]], true_features: np.ndarray
) -> Measured:
    """Every column that has a value for each scene."""
    scenes = [scene for story in told for scene in story]
    flat = [scene for story in drawn for scene in story]
    pictures = [scene.picture for scene in flat]
    seen, features = scorer.read(pictures), features_of(scorer, pictures)
    states = [scene.state for scene in scenes]
    right = {name: facts_right(states, seen, name) for name in FACTS}
    named = np.array([scene.names_kind for scene in scenes])
    prop_named = np.array([scene.names_prop for scene in scenes])
    carried = np.array([scene.state.prop is not None and not scene.names_prop for scene in scenes])
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(true_features, axis=1)
    values = right | {
        "hero_named": np.where(named, right["hero"], np.nan),
        "hero_unnamed": np.where(named, np.nan, right["hero"]),
        "prop_named": np.where(prop_named, right["prop"], np.nan),
        "prop_carried": np.where(carried, right["prop"], np.nan),
        "consistency": _consistency([len(story) for story in told], seen),
        "identity": _identities(told, pictures, seen),
        "image_similarity": (features * true_features).sum(1) / lengths,
        "seconds_per_scene": np.array([scene.seconds for scene in flat]),
        "llm_tokens_per_scene": np.array([float(scene.llm_tokens) for scene in flat]),
    }
    return Measured(values, features)


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
    told: list[list[TrueScene]], pictures: Sequence[Image.Image], seen: Sequence[State]
) -> np.ndarray:
    """Likeness of each story's hero to its first appearance."""
    values: list[float] = []
    for story in told:
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
    scorer: Scorer, singles: list[list[TrueScene]], drawn: list[list[Drawn]]
) -> dict[str, np.ndarray]:
    """For captions by themselves, whether each fact is right."""
    states = [scene.state for sheet in singles for scene in sheet]
    seen = scorer.read([one.picture for sheet in drawn for one in sheet])
    return {f"caption_{fact}": facts_right(states, seen, fact) for fact in FACTS}


def summarise(
    told: list[list[TrueScene]],
    measured: dict[str, Measured],
    true_features: np.ndarray,
    singles: dict[str, dict[str, np.ndarray]],
) -> dict:
    """The report: every column of every row with its interval, and the differences between rows."""
    groups = np.repeat(np.arange(len(told)), [len(story) for story in told])
    table: dict[str, dict] = {}
    for name, row in measured.items():
        cells = {column: cell(bootstrap(values, groups)) for column, values in row.values.items()}
        cells["fid"] = cell(_frechet_interval(row.features, true_features, groups))
        alone = singles.get(name, {})
        cells |= {column: cell(bootstrap(values, np.arange(len(values)))) for column, values in alone.items()}
        table[name] = {column: cells.get(column) for column in COLUMNS}
    differences: dict[str, dict] = {}
    for first, second in combinations(measured, 2):
        pairs = {
            column: (values, measured[second].values[column])
            for column, values in measured[first].values.items()
        }
        cells = {column: cell(bootstrap_difference(*pair, groups)) for column, pair in pairs.items()}
        for column in singles.get(first, {}).keys() & singles.get(second, {}).keys():
            one, other = singles[first][column], singles[second][column]
            cells[column] = cell(bootstrap_difference(one, other, np.arange(len(one))))
        differences[f"{first}-{second}"] = {column: cells.get(column) for column in COLUMNS}
    return {"rows": table, "differences": differences}


def _frechet_interval(features: np.ndarray, true: np.ndarray, groups: np.ndarray) -> Interval | None:
    """Fréchet distance to the true pictures' features, both (N, D); None for fewer than LEAST_FOR_FID pictures."""
    if len(features) < LEAST_FOR_FID:
        return None
    return resampled(frechet_distance, [(features, groups), (true, groups)])
