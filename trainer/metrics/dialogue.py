"""MM-Relevance of MMDialog (arXiv 2211.05719): a soft F1 of what a dialogue's turns should hold and do hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Elements(NamedTuple):
    """Texts or pictures, turn by turn: whether one should be there, whether one is, and their similarity, each (N,).

    The similarity is CLIP's cosine of text with text or picture with picture, and counts only where both are there.
    """

    wanted: np.ndarray
    found: np.ndarray
    similarity: np.ndarray


def mm_relevance(similarities: Sequence[float], missing: int, spurious: int) -> float:
    """2 P R / (P + R), P the similarities' sum by all found elements, R by all wanted ones; 0 where none matches."""
    total = float(sum(similarities))
    if total == 0:
        return 0.0
    precision = total / (len(similarities) + spurious)
    recall = total / (len(similarities) + missing)
    return 2 * precision * recall / (precision + recall)


def relevance_by_story(kinds: Sequence[Elements], groups: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """(S,) for turns of the dialogues `groups` (N,); `empty` for one where nothing is wanted and nothing found."""
    return np.array([_relevance(kinds, groups == group, empty) for group in np.unique(groups)])


def _relevance(kinds: Sequence[Elements], part: np.ndarray, empty: float) -> float:
    wanted, found, similarity = (
        np.concatenate([field[part] for field in fields]) for fields in zip(*kinds, strict=True)
    )
    if not (wanted | found).any():
        return empty
    missing, spurious = (wanted & ~found).sum(), (found & ~wanted).sum()
    return mm_relevance(similarity[wanted & found], int(missing), int(spurious))
