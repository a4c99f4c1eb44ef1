"""Distances between sets of pictures' features, by hand and against torchmetrics."""

import math

import numpy as np
import pytest
import torch

from minigpt5_core.metrics import frechet_distance
from tests.metrics.toys import needs
from trainer.metrics.distances import cmmd, inception_score, kernel_distance, resampled
from trainer.metrics.published import SEED, inception_score_of_parts


def exactly(mean: np.ndarray, covariance_root: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Features whose mean and covariance are given to the last digit."""
    chance = np.random.default_rng(seed).normal(size=(count, len(mean)))
    white = chance - chance.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False)).T)
    return white @ covariance_root.T + mean


def test_fid_of_known_normal_distributions():
    """Diagonal covariances: |m1 - m2|^2 and the sum of (s1 - s2)^2."""
    first = exactly(np.array([0.0, 1.0, 0.0]), np.diag([1.0, 2.0, 0.5]), 50, 0)
    second = exactly(np.array([1.0, 0.0, 0.0]), np.diag([2.0, 2.0, 0.1]), 30, 1)
    assert frechet_distance(first, second) == pytest.approx(2.0 + 1.0 + 0.16)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_fid_is_that_of_the_eigenvalues_with_few_and_with_many_pictures(count):
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(count, 16)), 1.5 * chance.normal(size=(count + 3, 16)) + 0.3
    means = first.mean(0) - second.mean(0)
    one, other = (np.cov(features, rowvar=False) for features in (first, second))
    shared = np.sqrt(np.maximum(np.linalg.eigvals(one @ other).real, 0)).sum()
    expected = means @ means + np.trace(one) + np.trace(other) - 2 * shared
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_kid_by_hand():
    """D is 1, the kernel (x y + 1)^3. Within {0, 1} it is 1, within {1, 2} 27; across 1, 1, 8, 27."""
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert kernel_distance(first, second) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


@pytest.mark.parametrize("block", [3, 4096])
def test_kid_of_sets_of_different_sizes(block):
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(4, 3)), chance.normal(size=(6, 3))
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [
        np.mean([k(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j])
        for one in (first, second)
    ]
    across = np.mean([k(x, y) for x in first for y in second])
    assert kernel_distance(first, second, block) == pytest.approx(sum(within) - 2 * across)


def test_cmmd_by_hand():
    """Squared distances: 2 within either pair, across 4, 2, 2, 4; the kernel exp(-d^2 / 200), the scale 1000."""
    first, second = np.eye(2), -np.eye(2)
    across = (math.exp(-0.02) + math.exp(-0.01)) / 2
    assert cmmd(first, second) == pytest.approx(1000 * (2 * math.exp(-0.01) - 2 * across))


def test_inception_score_by_hand():
    certain = 50.0 * np.eye(4)
    assert inception_score(certain) == pytest.approx(4.0)  # each picture of a class of its own
    assert inception_score(certain[[0, 0, 1, 1]]) == pytest.approx(2.0)
    assert inception_score(np.zeros((4, 3))) == pytest.approx(1.0)
    halves = np.log([[0.5, 0.5], [0.9, 0.1]])  # p(class) is (0.7, 0.3)
    divergences = [
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3),
        0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3),
    ]
    assert inception_score(halves) == pytest.approx(math.exp(np.mean(divergences)))


def test_published_inception_score_is_the_mean_of_ten_shuffled_parts():
    logits = np.random.default_rng(0).normal(size=(24, 5)) * 2
    shuffled = torch.from_numpy(logits[np.random.default_rng(SEED).permutation(24)])
    parts = [inception_score(part.numpy()) for part in shuffled.chunk(10)]
    assert inception_score_of_parts(logits) == pytest.approx(np.mean(parts))
    assert inception_score_of_parts(50 * np.eye(10)) == pytest.approx(1.0)  # one picture a part says nothing


class AsGiven(torch.nn.Module):
    """Lets torchmetrics' classes measure features instead of pictures."""

    num_features = 8

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@needs("torchmetrics")
@pytest.mark.filterwarnings("ignore")
def test_fid_kid_and_inception_score_are_torchmetrics(fidelity):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    chance = np.random.default_rng(0)
    true, drawn = chance.normal(size=(30, 8)), chance.normal(size=(30, 8)) * 1.2 + 0.2
    fid = FrechetInceptionDistance(feature=AsGiven(), input_img_size=(8,)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=AsGiven(), subsets=1, subset_size=30)
    for metric in (fid, kid):
        metric.update(torch.from_numpy(true), real=True)
        metric.update(torch.from_numpy(drawn), real=False)
    assert frechet_distance(true, drawn) == pytest.approx(fid.compute().item(), rel=1e-5)
    assert kernel_distance(true, drawn) == pytest.approx(kid.compute()[0].item(), rel=1e-5)
    score = InceptionScore(feature=AsGiven(), splits=1)
    score.update(torch.from_numpy(drawn))
    assert inception_score(drawn) == pytest.approx(score.compute()[0].item(), rel=1e-5)


def test_an_interval_is_over_stories():
    chance = np.random.default_rng(0)
    features = chance.normal(size=(40, 2))
    groups = np.repeat(np.arange(20), 2)
    spread = resampled(kernel_distance, [(features[:20], groups[:20]), (features[20:], groups[:20])])
    assert spread.low < spread.mean < spread.high
    assert spread.mean == kernel_distance(features[:20], features[20:])
    same = resampled(inception_score, [(np.tile(features[:2], (20, 1)), groups)])  # stories of one kind
    assert same.low == pytest.approx(same.mean) and same.high == pytest.approx(same.mean)
    assert resampled(kernel_distance, [(features[:1], groups[:1]), (features, groups)]) is None


def test_the_sets_of_an_interval_are_resampled_by_the_same_stories():
    """Two features a story, all moved by 2: whichever stories are drawn, the sets of a draw differ by that alone."""
    features, groups = np.random.default_rng(0).normal(size=(12, 1)), np.repeat(np.arange(6), 2)
    spread = resampled(frechet_distance, [(features, groups), (features + 2, groups)])
    assert (spread.low, spread.mean, spread.high) == pytest.approx((4.0, 4.0, 4.0))
