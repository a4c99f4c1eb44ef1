from dataclasses import dataclass

import pytest

from minigpt5_core.errors import BadInputError
from trainer.common.recipe import load_recipe


@dataclass(frozen=True)
class Inner:
    steps: int = 3


@dataclass(frozen=True)
class Outer:
    rate: float = 1e-3
    name: str = "x"
    widths: tuple = (1, 2)
    inner: Inner = Inner()


def test_a_recipe_is_read_from_toml_and_changed_by_hand(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("rate = 1\nwidths = [4, 5]\n[inner]\nsteps = 7\n")
    recipe = load_recipe(Outer, path, ["rate=2e-4", "name=some text", "inner.steps=9"])
    assert recipe == Outer(2e-4, "some text", (4, 5), Inner(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ratee=1", "unknown key 'ratee'. Valid keys: inner, name, rate, widths"),
        ("inner.step=1", "unknown key 'step'. Valid keys: steps"),
        ("rate=fast", "rate is 'fast', expected float"),
        ("rate", "has no '='"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(BadInputError, match=message):
        load_recipe(Outer, None, [change])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        load_recipe(Outer, tmp_path / "none.toml", [])
    (tmp_path / "broken.toml").write_text("rate = = 1")
    with pytest.raises(BadInputError, match="not valid TOML"):
        load_recipe(Outer, tmp_path / "broken.toml", [])
