import numpy as np
import pytest

from minigpt5_core.metrics import bootstrap, bootstrap_difference, frechet_distance


def test_the_mean_is_that_of_all_values_and_lies_in_its_interval():
    values, groups = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, 1, 2])
    found = bootstrap(values, groups)
    assert found.mean == pytest.approx(0.6)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0


def test_the_interval_is_that_of_a_mean_of_stories():
    """200 stories of one scene: the normal approximation, p +- 1.96 sqrt(p (1 - p) / n)."""
    values = np.array([1.0, 1.0, 1.0, 0.0] * 50)
    found = bootstrap(values, np.arange(200))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 200)
    assert found.low == pytest.approx(0.75 - half, abs=0.01)
    assert found.high == pytest.approx(0.75 + half, abs=0.01)


def test_scenes_of_one_story_count_as_one_draw():
    """The same 200 values in 50 equal stories: an interval of the means of 50 draws, not of 200."""
    values, groups = np.repeat([1.0, 0.0], 100), np.repeat(np.arange(50), 4)
    together, apart = bootstrap(values, groups), bootstrap(values, np.arange(200))
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.15)


def test_what_is_undefined_is_left_out():
    values = np.array([1.0, np.nan, np.nan, 0.0])
    assert bootstrap(values, np.array([0, 0, 1, 2])).mean == 0.5
    assert bootstrap(np.full(3, np.nan), np.arange(3)) is None
    alone = bootstrap(
        np.array([0.9, np.nan, np.nan]), np.arange(3)
    )  # draws without the one value say nothing
    assert (alone.low, alone.mean, alone.high) == pytest.approx((0.9, 0.9, 0.9))


def test_a_difference_is_taken_scene_by_scene():
    first, second = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0])
    found = bootstrap_difference(first, second, np.arange(4))
    assert found.mean == 0.5 and found.low >= 0.0


def test_the_frechet_distance_of_independent_normal_features():
    """Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2."""
    chance = np.random.default_rng(0)
    first = chance.normal(size=(200_000, 3)) * (1.0, 2.0, 0.5) + (0.0, 1.0, 0.0)
    second = chance.normal(size=(200_000, 3)) * (2.0, 2.0, 0.1) + (1.0, 0.0, 0.0)
    assert frechet_distance(first, second) == pytest.approx(2.0 + 1.0 + 0.16, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
