"""A mapper fitted to a text encoder's answers: what can be known by hand of targets, batches, dropout and seeds."""

import math

import pytest
import torch

from minigpt5_core.conditioning import SPACES, Conditioning, Space
from minigpt5_core.conditioning.fit import (
    FitSettings,
    Targets,
    _batches,
    _share_of_rate,
    check_start,
    fit_mapper,
    space_of_answers,
)
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.conditioning.mapper_file import MapperHeader, load_mapper, save_mapper
from minigpt5_core.errors import BadInputError

FEW = FitSettings(steps=6, batch=4)
EMPTY = Conditioning(torch.full((1, 2, 6), 3.0), torch.full((1, 5), -2.0))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_targets(tokens, pooled=None, empty=EMPTY, **settings):
    if pooled is None:
        empty = Conditioning(empty.tokens)
    targets = Targets(empty, **settings)
    targets.add(Conditioning(tokens, pooled))
    return targets


@pytest.fixture
def states():
    """12 scenes of 3 vokens, 16 wide."""
    return noise(12, 3, 16)


@pytest.fixture
def targets():
    return make_targets(noise(12, 2, 6, seed=1), noise(12, 5, seed=2))


# Targets


@pytest.mark.parametrize("in_memory", [1 << 20, 0], ids=["in memory", "on disk"])
def test_answers_come_back_to_half_precision(tmp_path, in_memory):
    tokens, pooled = 10 * noise(7, 2, 6), noise(7, 5, seed=1)
    targets = Targets(EMPTY, tmp_path, in_memory)
    for first in (0, 3, 6):
        targets.add(Conditioning(tokens[first : first + 3], pooled[first : first + 3]))
    found = targets.rows([6, 0, 6])
    assert len(targets) == 7
    assert torch.allclose(found.tokens, tokens[[6, 0, 6]], rtol=1e-3, atol=1e-2)
    assert torch.allclose(found.pooled, pooled[[6, 0, 6]], rtol=1e-3, atol=5e-3)
    assert not list(tmp_path.iterdir())  # the file has no name: nothing of it stays behind


def test_what_all_captions_share_with_the_empty_text_is_exact():
    empty = Conditioning(torch.full((1, 2, 6), 28.0123))
    targets = make_targets(empty.tokens.expand(3, -1, -1), empty=empty)
    assert torch.equal(targets.rows([2]).tokens, empty.tokens)


def test_mean_and_spread_are_those_of_the_answers():
    tokens = noise(50, 2, 6)
    targets = make_targets(tokens)
    assert torch.allclose(targets.tokens.mean, tokens.mean(0), atol=1e-5)
    assert torch.allclose(targets.tokens.std, tokens.std(0, correction=0), atol=1e-5)


def test_values_beyond_half_precision_are_kept_finite():
    targets = make_targets(torch.full((1, 2, 6), 1e6))
    assert torch.isfinite(targets.rows([0]).tokens).all()


def test_an_answer_of_another_shape_is_refused_with_both():
    with pytest.raises(BadInputError, match=r"\(3, 6\).*\(2, 6\)"):
        make_targets(noise(1, 3, 6))
    with pytest.raises(IndexError, match="caption 1 of 1"):
        make_targets(noise(1, 2, 6)).rows([1])


@pytest.mark.parametrize(
    ("tokens", "width", "pooled", "expected"),
    [
        (77, 768, 768, SPACES["sd15"]),
        (77, 1024, 1024, SPACES["sd21"]),
        (77, 2048, 1280, SPACES["sdxl"]),
        (154, 4096, 2048, SPACES["sd3"]),
        (77, 4096, 2048, Space("sd3", 77, 4096, 2048, 16)),  # without its T5
        (256, 4096, 768, SPACES["flux"]),
        (77, 128, 128, SPACES["storybook"]),
        (77, 160, 96, Space("text_160_96", 77, 160, 96, 0)),
        (77, 1280, None, Space("text_1280", 77, 1280, None, 0)),
    ],
)
def test_a_text_encoder_is_known_by_its_shapes_or_gets_a_name_of_its_own(tokens, width, pooled, expected):
    answer = Conditioning(torch.zeros(1, tokens, width), pooled and torch.zeros(1, pooled))
    assert space_of_answers(answer) == expected


def test_a_mapper_for_a_space_of_its_own_name_is_saved_and_loaded(states, targets, tmp_path):
    space = space_of_answers(EMPTY)
    fitted = fit_mapper(states, targets, FEW)
    save_mapper(tmp_path / "own.safetensors", fitted.mapper, MapperHeader(space, "toy", 16, ""))
    mapper, header = load_mapper(tmp_path / "own.safetensors")
    assert header.space == space
    assert torch.equal(mapper(states).tokens, fitted.mapper(states).tokens)


# Fitting


@pytest.mark.slow
def test_a_linear_target_is_learned():
    states = noise(64, 3, 16)
    tokens = (states.flatten(1) @ noise(48, 12, seed=1) / 7).view(64, 2, 6)
    settings = FitSettings(steps=150, batch=16, rate=3e-3, dropout=0.0)
    fitted = fit_mapper(states, make_targets(tokens), settings)
    assert fitted.losses[0] > 0.8  # the mean of standardised targets is as far as guessing nothing
    assert sum(fitted.losses[-10:]) / 10 < 0.1
    assert (fitted.mapper(states).tokens - tokens).square().mean() < 0.1 * tokens.var()


@pytest.mark.slow
def test_each_scene_learns_the_target_its_row_says(states):
    tokens = torch.stack([torch.full((2, 6), -1.0), torch.full((2, 6), 1.0)])
    rows = [0, 1] * 6
    settings = FitSettings(steps=120, batch=12, rate=3e-3, dropout=0.0)
    answer = fit_mapper(states, make_targets(tokens), settings, rows=rows).mapper(states).tokens
    assert torch.equal((answer.mean((1, 2)) > 0), torch.tensor(rows).bool())


@pytest.mark.slow
def test_the_answer_to_dropped_states_becomes_that_to_the_empty_text(states, targets):
    fitted = fit_mapper(states, targets, FitSettings(steps=150, batch=12, rate=3e-3, dropout=0.5))
    negative = fitted.mapper.negative()
    std = targets.tokens.std
    assert ((negative.tokens - EMPTY.tokens) / std).square().mean() < 0.05
    assert (negative.pooled - EMPTY.pooled).abs().max() < 0.3
    assert ((targets.tokens.mean - EMPTY.tokens) / std).square().mean() > 5  # which is far from their mean


def test_a_new_mapper_begins_at_the_scale_of_the_answers(states):
    tokens = 100 + 20 * noise(12, 2, 6)
    fitted = fit_mapper(states, make_targets(tokens), FitSettings(steps=1, dropout=0.0))
    assert fitted.losses[0] < 4
    assert torch.allclose(fitted.mapper.target_mean, tokens.mean(0), atol=1e-3)


def saved(tmp_path, fitted, name):
    header = MapperHeader(space_of_answers(EMPTY), "toy", 16, "", {"steps": len(fitted.losses)})
    save_mapper(tmp_path / name, fitted.mapper, header)
    return (tmp_path / name).read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_others(states, targets, tmp_path):
    first = saved(tmp_path, fit_mapper(states, targets, FEW), "a")
    torch.manual_seed(99)  # what was random before does not matter
    assert saved(tmp_path, fit_mapper(states, targets, FEW), "b") == first
    other = FitSettings(steps=6, batch=4, seed=1)
    assert saved(tmp_path, fit_mapper(states, targets, other), "c") != first


def test_the_hosts_own_random_numbers_are_left_alone(states, targets):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit_mapper(states, targets, FEW)
    assert torch.equal(torch.rand(1), expected)


def test_every_step_is_told_and_any_may_be_the_last(states, targets):
    heard = []

    def on_step(step, loss):
        heard.append((step, loss))
        return step == 3

    fitted = fit_mapper(states, targets, FEW, on_step=on_step)
    assert [step for step, _ in heard] == [1, 2, 3]
    assert [loss for _, loss in heard] == fitted.losses
    assert not fitted.mapper.training
    assert not any(weight.requires_grad for weight in fitted.mapper.parameters())


def test_an_earlier_mapper_goes_on_and_stays_as_it_was(states, targets):
    earlier = fit_mapper(states, targets, FitSettings(steps=60, batch=12, rate=3e-3)).mapper
    before = {name: weight.clone() for name, weight in earlier.state_dict().items()}
    again = fit_mapper(states, targets, FitSettings(steps=1, batch=12, dropout=0.0), start=earlier)
    fresh = fit_mapper(states, targets, FitSettings(steps=1, batch=12, dropout=0.0))
    assert again.losses[0] < 0.5 * fresh.losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in earlier.state_dict().items())


def test_what_was_made_in_inference_mode_can_be_learned_from(states, targets):
    with torch.inference_mode():
        theirs = fit_mapper_outside(states, targets)
    fitted = fit_mapper(states, targets, FEW, start=theirs)
    assert len(fitted.losses) == 6


def fit_mapper_outside(states, targets):
    mapper = build_mapper(compact_config(Space("", 2, 6, 5), 16, 3))
    assert next(mapper.parameters()).is_inference()
    return mapper


def test_an_earlier_mapper_of_another_shape_is_refused_with_what_differs(states, targets):
    other = build_mapper(compact_config(Space("", 2, 7), 16, 3))
    with pytest.raises(BadInputError, match="width 7 where 6 is needed, pooled width None where 5 is needed"):
        fit_mapper(states, targets, FEW, start=other)
    with pytest.raises(BadInputError, match="vokens 3 where 8 is needed, LLM width 16 where 99 is needed"):
        check_start(compact_config(Space("", 2, 6, 5), 16, 3), 8, 99, targets)


def test_a_loss_that_is_no_number_ends_it_with_what_to_do(states, targets):
    bad = states.clone()
    bad[:] = math.inf
    with pytest.raises(BadInputError, match="loss is nan at step 1. Set a lower learning rate than 0.001"):
        fit_mapper(bad, targets, FitSettings(dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [0]}, "12 voken states for 1 rows of 12 targets"),
        ({"rows": [12] * 12}, "12 voken states for 12 rows of 12 targets"),
        ({"settings": FitSettings(steps=0)}, "steps is 0"),
        ({"settings": FitSettings(batch=0)}, "batch is 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(states, targets, changes, said):
    with pytest.raises(BadInputError, match=said):
        fit_mapper(states, targets, **changes)


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing():
    settings = FitSettings(steps=100, warmup=0.1)
    shares = [_share_of_rate(done, settings) for done in range(101)]
    assert shares[0] == pytest.approx(1 / 11)
    assert max(shares) == shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0, abs=1e-9)


def test_every_scene_is_drawn_once_before_any_is_drawn_again():
    batches = list(_batches(10, FitSettings(steps=5, batch=4), torch.Generator().manual_seed(0)))
    drawn = [one for batch in batches for one in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_more_scenes_in_a_batch_than_there_are_come_several_times():
    (batch,) = _batches(3, FitSettings(steps=1, batch=7), torch.Generator().manual_seed(0))
    assert len(batch) == 7 and set(batch) == {0, 1, 2}
