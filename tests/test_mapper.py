import warnings

import pytest
import torch

from minigpt5_core.conditioning import SPACES, Space
from minigpt5_core.conditioning.mapper import (
    MAPPERS,
    Mapper,
    build_mapper,
    compact_config,
    connector_config,
    reference_config,
)
from minigpt5_core.config import MapperConfig
from minigpt5_core.errors import BadInputError

TOY = Space("toy", tokens=5, width=12, pooled_width=None)
POOLED = Space("toy", tokens=5, width=12, pooled_width=6)


def toy_config(kind: str, space: Space = TOY) -> MapperConfig:
    sizes = {"tokens": space.tokens, "width": space.width, "pooled_width": space.pooled_width}
    return MapperConfig(
        kind=kind, vokens=3, llm_width=16, hidden=12, heads=2, layers=1, feed_forward=24, **sizes
    )


def toy_mapper(kind: str, space: Space = TOY) -> Mapper:
    torch.manual_seed(0)
    return build_mapper(toy_config(kind, space))


@pytest.mark.parametrize("kind", MAPPERS)
def test_a_mapper_turns_voken_states_into_conditioning_tokens(kind):
    answer = toy_mapper(kind)(torch.randn(2, 3, 16))
    assert answer.tokens.shape == (2, 5, 12)
    assert answer.pooled is None


@pytest.mark.parametrize("kind", MAPPERS)
def test_a_space_with_a_pooled_vector_gets_one(kind):
    assert toy_mapper(kind, POOLED)(torch.randn(2, 3, 16)).pooled.shape == (2, 6)


@pytest.mark.parametrize("kind", MAPPERS)
def test_states_of_another_shape_are_refused_with_both_shapes(kind):
    with pytest.raises(BadInputError, match=r"\(2, 3, 17\).*3 vokens, 16 wide"):
        toy_mapper(kind)(torch.randn(2, 3, 17))


@pytest.mark.parametrize("kind", MAPPERS)
def test_half_precision_states_are_taken_in_the_mapper_s_own_dtype(kind):
    assert toy_mapper(kind)(torch.randn(1, 3, 16, dtype=torch.bfloat16)).tokens.dtype == torch.float32


@pytest.mark.parametrize("kind", MAPPERS)
def test_every_parameter_gets_a_gradient(kind):
    mapper = toy_mapper(kind, POOLED)
    answer = mapper(torch.randn(2, 3, 16))
    (answer.tokens.square().sum() + answer.pooled.square().sum()).backward()
    assert [name for name, weight in mapper.named_parameters() if not weight.grad.any()] == []


@pytest.mark.parametrize("kind", MAPPERS)
def test_building_a_mapper_raises_no_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_mapper(kind)


def test_the_reference_ignores_the_order_of_the_vokens_and_the_compact_mapper_knows_it():
    states = torch.randn(1, 3, 16)
    for kind, moves in (("reference", False), ("compact", True)):
        mapper = toy_mapper(kind)
        change = (mapper(states).tokens - mapper(states.flip(1)).tokens).abs().max().item()
        assert (change > 1e-3) == moves


def test_the_reference_has_exactly_the_published_number_of_parameters():
    with torch.device("meta"):
        mapper = build_mapper(reference_config(SPACES["sd21"], llm_width=4096))
    count = sum(weight.numel() for weight in mapper.parameters())
    assert (
        count == 117_575_680 + 5_244_928 + 78_848
    )  # mapper, fc, learned queries of the published checkpoints
    assert len(mapper.transformer.state_dict()) == 124
    assert not list(mapper.buffers())


def test_the_reference_agrees_with_torch_s_own_transformer():
    mapper = toy_mapper("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        plain = torch.nn.Transformer(12, 2, 1, 1, 24, 0.0, batch_first=True, norm_first=True)
    plain.load_state_dict(mapper.transformer.state_dict())
    states = torch.randn(2, 3, 16)
    expected = plain(mapper.fc(states), mapper.queries.repeat(2, 1, 1))
    assert torch.allclose(mapper(states).tokens, expected, atol=1e-6)


def test_a_reference_of_another_hidden_width_is_refused():
    values = toy_config("reference").to_dict() | {"hidden": 8}
    with pytest.raises(BadInputError, match="conditioning width 12, found hidden 8"):
        build_mapper(MapperConfig.from_dict(values))


@pytest.mark.parametrize("config", [compact_config, connector_config])
def test_our_own_mappers_have_2_2_million_parameters_for_the_storybook(config):
    mapper = build_mapper(config(SPACES["storybook"], llm_width=576))
    assert 2.0e6 <= sum(weight.numel() for weight in mapper.parameters()) <= 2.2e6


def test_a_connector_reads_the_states_at_its_queries_and_not_what_stands_before_them():
    """Torch's own encoder, both ways, over the rows after the first and the learned slots."""
    mapper = toy_mapper("connector").eval()
    states = torch.randn(2, 3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        layer = torch.nn.TransformerEncoderLayer(12, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        plain = torch.nn.TransformerEncoder(layer, 1, torch.nn.LayerNorm(12)).eval()
    plain.load_state_dict(mapper.transformer.state_dict())
    rows = mapper.input(states[:, 1:]) + mapper.positions
    read = plain(torch.cat((rows, mapper.queries.repeat(2, 1, 1)), 1))
    assert torch.allclose(mapper(states).tokens, mapper.output(read[:, 2:]), atol=1e-6)
    changed = torch.cat((torch.randn(2, 1, 16), states[:, 1:]), 1)
    assert torch.equal(mapper(changed).tokens, mapper(states).tokens)


def test_a_connector_of_one_voken_has_no_query():
    with pytest.raises(BadInputError, match="2 vokens or more"):
        build_mapper(MapperConfig.from_dict(toy_config("connector").to_dict() | {"vokens": 1}))


@pytest.mark.parametrize("config", [compact_config, connector_config])
def test_a_fresh_mapper_of_our_own_answers_with_mean_zero_and_deviation_one(config):
    torch.manual_seed(0)
    mapper = build_mapper(config(SPACES["storybook"], llm_width=576))
    with torch.no_grad():
        tokens = mapper(torch.randn(16, mapper.config.vokens, 576)).tokens
    assert tokens.mean().abs() < 0.1
    assert tokens.std((0, 1)).min() > 0.5 and tokens.std((0, 1)).max() < 1.5


@pytest.mark.parametrize("kind", ["compact", "connector"])
def test_our_own_mapper_s_answer_is_carried_to_the_target_s_scale(kind):
    mapper = toy_mapper(kind)
    states = torch.randn(2, 3, 16)
    raw = mapper(states).tokens
    mean, deviation = torch.randn(5, 12), torch.rand(5, 12)
    mapper.target_mean.copy_(mean)
    mapper.target_std.copy_(deviation)
    assert torch.allclose(mapper(states).tokens, raw * deviation + mean, atol=1e-6)


@pytest.mark.parametrize("kind", MAPPERS)
def test_the_negative_is_the_answer_to_zero_states_and_computed_once(kind):
    mapper = toy_mapper(kind, POOLED)
    negative = mapper.negative()
    expected = mapper(torch.zeros(1, 3, 16))
    assert torch.allclose(negative.tokens, expected.tokens, atol=1e-6)
    assert torch.allclose(negative.pooled, expected.pooled, atol=1e-6)
    assert not negative.tokens.requires_grad
    assert mapper.negative() is negative


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_negative_follows_weights_that_are_trained_loaded_or_cast(mode):
    mapper, other = toy_mapper("compact"), build_mapper(toy_config("compact"))
    with mode():
        first = mapper.negative().tokens
        mapper.load_state_dict(other.state_dict())
        assert torch.equal(mapper.negative().tokens, other.negative().tokens)
        assert not torch.equal(mapper.negative().tokens, first)
        assert mapper.to(torch.bfloat16).negative().tokens.dtype == torch.bfloat16
    mapper.float()(torch.randn(1, 3, 16)).tokens.sum().backward()
    before = mapper.negative().tokens
    torch.optim.SGD(mapper.parameters(), lr=0.1).step()
    assert not torch.equal(mapper.negative().tokens, before)


def test_an_unknown_kind_is_an_error_that_lists_the_known_ones():
    with pytest.raises(BadInputError, match="'huge'. Known kinds: compact, connector, reference"):
        build_mapper(MapperConfig.from_dict(toy_config("compact").to_dict() | {"kind": "huge"}))
