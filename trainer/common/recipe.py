"""Recipes: TOML files read into frozen dataclasses; a key nobody knows is refused, any value can be set by hand.

A recipe whose fields are dataclasses has a TOML table for each. `FORMER` of its class are keys by other names, such as
they had before, {old: "key" or "table.key"}; with `FLAT` it takes the keys of its tables outside of them as well.
"""

import dataclasses
import math
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from minigpt5_core.config import build
from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import text_in

Recipe = TypeVar("Recipe")


def load_recipe(kind: type[Recipe], path: Path | None, changes: list[str]) -> Recipe:
    """The recipe at `path`, with `key=value` changes laid over it; `kind`'s defaults fill the rest.

    Raises BadInputError for a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    return build_recipe(kind, read_values(kind, path, changes), str(path) if path else "--set")


def read_values(kind: type, path: Path | None, changes: list[str]) -> dict[str, Any]:
    """What the recipe at `path` says, with `key=value` changes laid over it, every key in its place.

    Raises BadInputError for a missing file, broken TOML or a change that is not one.
    """
    source = str(path) if path else "--set"
    values = in_place(kind, _read(path), source) if path else {}
    for change in changes:
        placed = in_place(kind, _read_change(change), source)
        _merge(values, _as_written(kind, placed, change.partition("=")[2].strip()), change)
    return values


def _as_written(kind: type, values: dict[str, Any], text: str) -> dict[str, Any]:
    """The one value among nested ones as `text` where its field holds text: a folder may be called 2024-05-01."""
    hints = get_type_hints(kind)
    written: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(value, dict) and isinstance(hint, type) and dataclasses.is_dataclass(hint):
            written[name] = _as_written(hint, value, text)
        else:
            written[name] = text if hint in (str, str | None) and not isinstance(value, str) else value
    return written


def make_recipe(kind: type[Recipe], **values: Any) -> Recipe:
    """A recipe from values by their flat names: `make_recipe(AlignRecipe, steps=3, batch=2)`."""
    return build_recipe(kind, values, kind.__name__)


def change_recipe(recipe: Recipe, **values: Any) -> Recipe:
    """The same recipe with other values, by their flat names."""
    kind = type(recipe)
    merged = dataclasses.asdict(recipe)  # type: ignore[call-overload]
    for name, value in values.items():
        _merge(merged, in_place(kind, {name: value}, kind.__name__), name)
    return build_recipe(kind, merged, kind.__name__)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text_in(path))
    except OSError as error:
        raise BadInputError(
            f"Recipe {path} cannot be read: {error.strerror}. See trainer/recipes/."
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or tables in tables in tables
        raise BadInputError(f"Recipe {path} is not valid TOML: {error}.{_about_windows(error)}") from error


def _about_windows(error: Exception) -> str:
    """How to write a path with backslashes, where these may be the trouble."""
    said = str(error).lower()
    hint = " A path with backslashes stands in single quotation marks: 'C:\\data\\mine'."
    return hint if "escape" in said or "\\" in said or "hex value" in said else ""


def _read_change(change: str) -> dict[str, Any]:
    """`table.key=value` as the nested dict that TOML makes of it."""
    key, equals, value = change.partition("=")
    if not equals:
        raise BadInputError(f"--set {change!r} has no '='. Write --set key=value, e.g. --set steps=100.")
    return _nested(tuple(key.strip().split(".")), _parse(value.strip()))


def _parse(text: str) -> Any:
    """A value written as in TOML; anything that is not TOML is taken as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with others laid over them, table by table and key by key."""
    both = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    _merge(both, changes, "a change")
    return both


def _merge(values: dict[str, Any], change: dict[str, Any], told: str) -> None:
    """Lays nested values over others, key by key, in place."""
    for name, value in change.items():
        if not isinstance(value, dict) or name not in values:
            values[name] = value
        elif isinstance(values[name], dict):
            _merge(values[name], value, told)
        else:
            raise BadInputError(f"--set {told!r}: {name} is a value, not a table. Write --set {name}=value.")


def in_place(kind: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values with every key that `kind` knows by another name, or in another place, where it belongs.

    BadInputError, opening with `source`, for a key that a kind with flat keys does not know.
    """
    own = {field.name for field in dataclasses.fields(kind)}
    tables, elsewhere = _tables(kind), flat_keys(kind)
    placed: dict[str, Any] = {}
    for name, value in values.items():
        if name in elsewhere and not (name in tables and isinstance(value, dict)):
            path = elsewhere[name]
            _say_if_former(name, path)
            _merge(placed, _nested(path, value), name)
        elif name in own or not getattr(kind, "FLAT", False):
            _merge(placed, {name: value}, name)
        else:
            known = ", ".join(sorted(set(elsewhere) - (set(_former(kind)) - set(tables))))
            raise BadInputError(
                f"{source}: unknown key {name!r}. Valid keys: {known}; in tables: [{'], ['.join(tables)}]."
            )
    return placed


def flat_keys(kind: type) -> dict[str, tuple[str, ...]]:
    """Where each key belongs that `kind` takes in another place too, (table, key) or (key,), by its name there."""
    tables = _tables(kind) if getattr(kind, "FLAT", False) else {}
    found: dict[str, tuple[str, ...]] = {
        field.name: (table, field.name)
        for table, inner in tables.items()
        for field in dataclasses.fields(inner)
    }
    return found | {old: tuple(new.split(".")) for old, new in _former(kind).items()}


def _former(kind: type) -> dict[str, str]:
    return getattr(kind, "FORMER", {})


def _tables(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def _say_if_former(name: str, path: tuple[str, ...]) -> None:
    """Of a key that has another name now; one that is only in a table now goes on without a word."""
    if name not in path:
        where = f", in the table [{path[0]}]" if len(path) > 1 else ""
        print(f"{name} is called {path[-1]} now{where}; the old name goes on working.")


def build_recipe(kind: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """A recipe from decoded TOML; BadInputError, opening with `source`, for unknown keys and wrong types."""
    hints = get_type_hints(kind)
    values = in_place(kind, values, source)
    return build(
        kind, {key: _coerce(value, hints.get(key), key, source) for key, value in values.items()}, source
    )


def _coerce(value: Any, expected: Any, key: str, source: str) -> Any:
    """What TOML writes another way than the dataclass holds it: tables, arrays, whole numbers for floats."""
    if dataclasses.is_dataclass(expected) and isinstance(expected, type) and isinstance(value, dict):
        return build_recipe(expected, value, f"{source}: {key}")
    if isinstance(value, list) and (expected is tuple or get_origin(expected) is tuple):
        return tuple(value)
    if isinstance(value, date | time):
        raise BadInputError(
            f'{source}: {key} is a date or a time; write it in quotation marks: {key} = "{value}".'
        )
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInputError(f"{source}: {key} is {value}; give a number that is finite.")
    return value
