"""Recipes: TOML files read into frozen dataclasses; a key nobody knows is refused, any value can be set by hand.

A recipe whose fields are dataclasses has a TOML table for each. One that names its `FORMER` keys takes every key of its
tables flat as well, as recipes were written before there were tables.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from minigpt5_core.config import build
from minigpt5_core.errors import BadInputError

Recipe = TypeVar("Recipe")


def load_recipe(kind: type[Recipe], path: Path | None, changes: list[str]) -> Recipe:
    """The recipe at `path`, with `key=value` changes laid over it; `kind`'s defaults fill the rest.

    Raises BadInputError for a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    source = str(path) if path else "--set"
    values = _in_tables(kind, _read(path), source) if path else {}
    for change in changes:
        _merge(values, _in_tables(kind, _read_change(change), source), change)
    return build_recipe(kind, values, source)


def make_recipe(kind: type[Recipe], **values: Any) -> Recipe:
    """A recipe from values by their flat names: `make_recipe(AlignRecipe, steps=3, batch=2)`."""
    return build_recipe(kind, values, kind.__name__)


def change_recipe(recipe: Recipe, **values: Any) -> Recipe:
    """The same recipe with other values, by their flat names."""
    kind = type(recipe)
    merged = dataclasses.asdict(recipe)  # type: ignore[call-overload]
    for name, value in values.items():
        _merge(merged, _in_tables(kind, {name: value}, kind.__name__), name)
    return build_recipe(kind, merged, kind.__name__)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(
            f"Recipe {path} cannot be read: {error.strerror}. See trainer/recipes/."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"Recipe {path} is not valid TOML: {error}.") from error


def _read_change(change: str) -> dict[str, Any]:
    """`table.key=value` as the nested dict that TOML makes of it."""
    key, equals, value = change.partition("=")
    if not equals:
        raise BadInputError(f"--set {change!r} has no '='. Write --set key=value, e.g. --set steps=100.")
    *tables, name = key.strip().split(".")
    read: dict[str, Any] = {name: _parse(value.strip())}
    for table in reversed(tables):
        read = {table: read}
    return read


def _parse(text: str) -> Any:
    """A value written as in TOML; anything that is not TOML is taken as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(values: dict[str, Any], change: dict[str, Any], told: str) -> None:
    """Lays nested values over others, key by key."""
    for name, value in change.items():
        if not isinstance(value, dict) or name not in values:
            values[name] = value
        elif isinstance(values[name], dict):
            _merge(values[name], value, told)
        else:
            raise BadInputError(f"--set {told!r}: {name} is a value, not a table. Write --set {name}=value.")


def flat_keys(kind: type) -> dict[str, tuple[str, str]]:
    """Where each key of a recipe's tables belongs, (table, key), by its flat name and by those it had before."""
    tables = _tables(kind)
    found = {
        field.name: (table, field.name)
        for table, inner in tables.items()
        for field in dataclasses.fields(inner)
    }
    former: dict[str, str] = getattr(kind, "FORMER", {})
    for old, new in former.items():
        table, _, key = new.partition(".")
        found[old] = table, key
    return found


def _tables(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}


def _in_tables(kind: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values with every flat key in its table, for a kind of recipe that takes flat keys."""
    if not hasattr(kind, "FORMER"):
        return values
    tables, flat = _tables(kind), flat_keys(kind)
    placed: dict[str, Any] = {}
    for name, value in values.items():
        if name in tables and isinstance(value, dict):
            _merge(placed, {name: value}, name)
        elif name in flat:
            table, key = flat[name]
            _say_if_former(name, table, key)
            _merge(placed, {table: {key: value}}, name)
        else:
            known = ", ".join(sorted(set(flat) - set(kind.FORMER)))
            raise BadInputError(
                f"{source}: unknown key {name!r}. Valid keys: {known}; in tables: [{'], ['.join(tables)}]."
            )
    return placed


def _say_if_former(name: str, table: str, key: str) -> None:
    if name not in (key, table):
        print(f"{name} is called {key} now, in the table [{table}]; the old name goes on working.")


def build_recipe(kind: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """A recipe from decoded TOML; BadInputError, opening with `source`, for unknown keys and wrong types."""
    hints = get_type_hints(kind)
    values = _in_tables(kind, values, source)
    return build(
        kind, {key: _coerce(value, hints.get(key), key, source) for key, value in values.items()}, source
    )


def _coerce(value: Any, expected: Any, key: str, source: str) -> Any:
    """What TOML writes another way than the dataclass holds it: tables, arrays, whole numbers for floats."""
    if dataclasses.is_dataclass(expected) and isinstance(expected, type) and isinstance(value, dict):
        return build_recipe(expected, value, f"{source}: {key}")
    if isinstance(value, list) and (expected is tuple or get_origin(expected) is tuple):
        return tuple(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
