"""What raters prefer and how far they agree: shares, Bradley-Terry strength, Krippendorff's alpha.

The intervals are percentile intervals over resampled pairs, 95 %: a pair's answers by several raters hang together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minigpt5_core.metrics import Interval, bootstrap

from .answers import Answer
from .study import CHOICES, Study

SCORES = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Strength:
    """Bradley-Terry strength of A over B in log-odds; None where it is infinite: one side won everything."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Preference:
    """The answers to one question: how many, from how many raters on how many pairs, and what they say.

    `a`, `tie` and `b` are shares of the answers. `score` is that of A's wins and half of the ties, `strength` its
    log-odds. The alphas are None where nothing can be said: no pair with two raters, or one answer throughout.
    """

    answers: int
    raters: int
    pairs: int
    a: Interval
    tie: Interval
    b: Interval
    score: Interval
    strength: Strength
    alpha_nominal: float | None
    alpha_ordinal: float | None


def prefer(study: Study, answers: Sequence[Answer], seed: int = 0) -> Preference:
    """What the answers to one question say; there must be one at least."""
    by_name = {pair.name: pair for pair in study.pairs}
    winners = np.array([by_name[answer.pair].winner(answer.answer) for answer in answers])
    groups = np.array([answer.pair for answer in answers])
    share = {system: _interval(winners == system, groups, seed) for system in SCORES}
    score = _interval(np.array([SCORES[winner] for winner in winners]), groups, seed)
    values = reliability_data(answers)
    return Preference(
        answers=len(answers),
        raters=values.shape[0],
        pairs=values.shape[1],
        **share,
        score=score,
        strength=bradley_terry(score),
        alpha_nominal=krippendorff_alpha(values, "nominal"),
        alpha_ordinal=krippendorff_alpha(values, "ordinal"),
    )


def bradley_terry(score: Interval) -> Strength:
    """The strength of A minus that of B: ln(s / (1 - s)), where s is the share of A's wins and half of the ties.

    For two systems this is the maximum likelihood estimate of the model P(A beats B) = 1 / (1 + exp(-strength))
    (Bradley and Terry 1952), a tie counted as half a win for each. The logarithm of the odds only ever grows with s,
    so the ends of the interval of s give those of the strength.
    """
    return Strength(*(_log_odds(value) for value in (score.mean, score.low, score.high)))


def reliability_data(answers: Sequence[Answer]) -> np.ndarray:
    """(raters, pairs): 0 left, 1 tie, 2 right, NaN where a rater gave no answer.

    The answers are taken as they were given, by side, and not by system. Each system is shown left in half of the
    pairs, so that raters who all prefer one system agree beyond chance; by system they would all say the same word
    each time, and of that alpha can say nothing.
    """
    raters = sorted({answer.rater for answer in answers})
    pairs = sorted({answer.pair for answer in answers})
    values = np.full((len(raters), len(pairs)), np.nan)
    for answer in answers:
        values[raters.index(answer.rater), pairs.index(answer.pair)] = CHOICES.index(answer.answer)
    return values


def krippendorff_alpha(values: np.ndarray, level: Literal["nominal", "ordinal"]) -> float | None:
    """Agreement of raters on `values` (raters, units), NaN for missing: 1 perfect, 0 as by chance, None undefined.

    alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck over the coincidences o of values c and k within units
    (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability). The squared difference d is 1 for any two
    nominal values, as most studies report it. Ordinal values have an order, left, tie, right: d is the square of how
    many values lie from one to the other, so that left against right is a greater disagreement than left against tie.
    """
    kinds = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == kinds).sum(0)  # (units, kinds)
    counts = counts[counts.sum(1) > 1]  # a value that no other rater's can be compared with says nothing
    compared = counts.sum(1) - 1
    coincidences = (counts.T / compared) @ counts - np.diag((counts / compared[:, None]).sum(0))
    totals = coincidences.sum(0)
    difference = _squared_difference(totals, level)
    expected = (np.outer(totals, totals) * difference).sum()
    if not expected:
        return None
    return float(1 - (totals.sum() - 1) * (coincidences * difference).sum() / expected)


def _squared_difference(totals: np.ndarray, level: Literal["nominal", "ordinal"]) -> np.ndarray:
    """(kinds, kinds), of values that occur `totals` times."""
    if level == "nominal":
        return 1.0 - np.eye(len(totals))
    middles = np.cumsum(totals) - totals / 2  # a value's mean rank
    return (middles[:, None] - middles) ** 2


def _interval(values: np.ndarray, groups: np.ndarray, seed: int) -> Interval:
    interval = bootstrap(values.astype(float), groups, seed)
    assert interval is not None  # there are answers, and none is NaN
    return interval


def _log_odds(share: float) -> float | None:
    return math.log(share / (1 - share)) if 0 < share < 1 else None
