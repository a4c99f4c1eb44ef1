"""Numbers about pictures and stories, with intervals: means by bootstrap over stories, Frechet distance of features."""

from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> Interval | None:
    """The mean of `values` (N,), and the percentile interval over resampled groups, such as the scenes of a story.

    NaN marks what is undefined and is left out; None when nothing is defined. Scenes of one story are not independent,
    so whole stories are resampled.
    """
    counts, sums = _by_group(values, groups)
    if not counts.sum():
        return None
    chosen = np.random.default_rng(seed).integers(0, len(counts), (DRAWS, len(counts)))
    sizes = counts[chosen].sum(1)
    drawn = sums[chosen].sum(1)[sizes > 0] / sizes[sizes > 0]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def bootstrap_difference(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, seed: int = 0
) -> Interval | None:
    """The mean and interval of the difference of two systems that were measured on the same scenes."""
    return bootstrap(first - second, groups, seed)


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, index = np.unique(groups, return_inverse=True)
    defined = ~np.isnan(values)
    counts = np.bincount(index, defined)
    return counts, np.bincount(index, np.where(defined, values, 0.0))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between the normal distributions fitted to two sets of features, (N, D) and (M, D) (arXiv 1706.08500).

    FID on Inception's: |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = R^T R, the last trace is the sum of the singular values of R1 R2^T: a matrix of at most N x M. That
    is accurate for five pictures in 2048 dimensions too, where the eigenvalues of C1 C2 are not.
    """
    means = first.mean(0) - second.mean(0)
    roots = [_covariance_root(features) for features in (first, second)]
    spread = sum(float((root**2).sum()) for root in roots)
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(means @ means + spread - 2 * shared)


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """R (at most D rows, D), with R^T R the unbiased covariance."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred
