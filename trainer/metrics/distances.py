"""Distances between sets of pictures, on features (N, D) and (M, D) in double precision, and their intervals."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from minigpt5_core.metrics import Interval

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
BLOCK = 4096  # rows of a kernel matrix at a time

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
Sets = Sequence[tuple[np.ndarray, np.ndarray]]


def kernel_distance(first: np.ndarray, second: np.ndarray, block: int = BLOCK) -> float:
    """KID on Inception's features (arXiv 1801.01401): unbiased MMD^2, kernel (x y / D + 1)^3, all pictures.

    `block` rows of the kernel's matrix are in memory at a time.
    """
    return _mmd(first, second, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, block)


def cmmd(first: np.ndarray, second: np.ndarray) -> float:
    """CMMD on CLIP features of length 1 (arXiv 2401.09603): 1000 MMD^2 with a Gaussian kernel, sigma 10.

    Unbiased, as in the paper. The authors' code counts each picture with itself too, which adds about 0.1 for a hundred
    pictures a side and nothing for the 30,000 that they have.
    """
    return CMMD_SCALE * _mmd(first, second, partial(_gaussian, 1 / (2 * CMMD_SIGMA**2)))


def _gaussian(gamma: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None]
    return np.exp(-gamma * (squares - 2 * first @ second.T))


def _mmd(first: np.ndarray, second: np.ndarray, kernel: Kernel, block: int = BLOCK) -> float:
    within = [_off_diagonal_mean(features, kernel, block) for features in (first, second)]
    return sum(within) - 2 * _mean(first, second, kernel, block)


def _off_diagonal_mean(features: np.ndarray, kernel: Kernel, block: int) -> float:
    """Of each row with every other one."""
    starts = range(0, len(features), block)
    blocks = ((start, kernel(features[start : start + block], features)) for start in starts)
    total = sum(rows.sum() - np.trace(rows, offset=start) for start, rows in blocks)
    return float(total) / (len(features) * (len(features) - 1))


def _mean(first: np.ndarray, second: np.ndarray, kernel: Kernel, block: int) -> float:
    starts = range(0, len(first), block)
    total = sum(kernel(first[start : start + block], second).sum() for start in starts)
    return float(total) / (len(first) * len(second))


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean KL divergence of p(class | picture) from p(class), from logits (N, K) (arXiv 1606.03498)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_chances = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    chances = np.exp(log_chances)
    return float(np.exp((chances * (log_chances - np.log(chances.mean(0)))).sum(1).mean()))


def resampled(measure: Callable[..., float], sets: Sets, least: int = 2, draws: int = 100) -> Interval | None:
    """`measure` of sets of features (N, D), each with the story (N,) of each row, whole stories drawn for the interval.

    None where a set has fewer than `least` rows.
    """
    if any(len(features) < least for features, _ in sets):
        return None
    stories = np.unique(np.concatenate([groups for _, groups in sets]))
    members = [[np.flatnonzero(groups == story) for story in stories] for _, groups in sets]
    rng = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        drawn = rng.integers(0, len(stories), len(stories))
        rows = [np.concatenate([of_story[index] for index in drawn]) for of_story in members]
        if min(map(len, rows)) >= least:
            values.append(measure(*(features[row] for row, (features, _) in zip(rows, sets, strict=True))))
    low, middle, high = np.percentile(values, (2.5, 50, 97.5))
    whole = measure(*(features for features, _ in sets))
    # stories drawn twice move these values: of the drawn ones only the spread is taken
    return Interval(whole, float(whole + low - middle), float(whole + high - middle))
