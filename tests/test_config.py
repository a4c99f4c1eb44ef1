import json

import pytest

from minigpt5_core.config import MapperConfig, build
from minigpt5_core.errors import BadInputError

VALUES = {
    "kind": "compact",
    "vokens": 8,
    "llm_width": 16,
    "tokens": 7,
    "width": 12,
    "hidden": 8,
    "heads": 2,
    "layers": 1,
    "feed_forward": 16,
    "pooled_width": None,
}


def test_a_config_survives_the_way_through_json():
    config = MapperConfig.from_dict(VALUES)
    assert MapperConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_refused_with_the_list_of_valid_ones():
    with pytest.raises(BadInputError, match="unknown key 'depth'. Valid keys: feed_forward, heads"):
        MapperConfig.from_dict(VALUES | {"depth": 3})


def test_a_missing_key_is_named():
    with pytest.raises(BadInputError, match="missing key 'heads'"):
        MapperConfig.from_dict({key: value for key, value in VALUES.items() if key != "heads"})


@pytest.mark.parametrize("wrong", ["8", 8.0, True, None])
def test_a_value_of_the_wrong_type_is_refused(wrong):
    with pytest.raises(BadInputError, match="vokens is .* expected int"):
        MapperConfig.from_dict(VALUES | {"vokens": wrong})


def test_the_optional_pooled_width_takes_a_number_or_null():
    assert MapperConfig.from_dict(VALUES | {"pooled_width": 5}).pooled_width == 5
    with pytest.raises(BadInputError, match="pooled_width"):
        MapperConfig.from_dict(VALUES | {"pooled_width": "5"})


def test_sizes_below_one_are_refused():
    with pytest.raises(BadInputError, match="layers is 0"):
        MapperConfig.from_dict(VALUES | {"layers": 0})


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(BadInputError, match="hidden 8 cannot be split over 3 heads"):
        MapperConfig.from_dict(VALUES | {"heads": 3})


def test_anything_but_an_object_is_refused():
    with pytest.raises(BadInputError, match="Header: found list"):
        build(MapperConfig, [1], "Header")
