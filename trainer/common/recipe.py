"""Recipes: TOML files read into frozen dataclasses; a key nobody knows is refused, any value can be set by hand."""

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
    return build_recipe(kind, read_values(kind, path, changes), str(path) if path else "--set")


def read_values(kind: type, path: Path | None, changes: list[str]) -> dict[str, Any]:
    """What the recipe at `path` says, with `key=value` changes laid over it, old keys under their names of today.

    Raises BadInputError for a missing file, broken TOML or a change that is not one.
    """
    values = with_new_keys(kind, _read(path)) if path else {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise BadInputError(f"--set {change!r} has no '='. Write --set key=value, e.g. --set steps=100.")
        *tables, name = key.strip().split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise BadInputError(
                    f"--set {change!r}: {table} is a value, not a table. Write --set {table}=value."
                )
        name = name if tables else next(iter(with_new_keys(kind, {name: None})))
        place[name] = _parse(value.strip())
    return values


def with_new_keys(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` by the keys of today: those in `kind.RENAMED`, {old: new}, go on working, and a line says so."""
    renamed: dict[str, str] = getattr(kind, "RENAMED", {})
    for old in renamed.keys() & values.keys():
        print(f"{old} is called {renamed[old]} now")
    return {renamed.get(key, key): value for key, value in values.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(
            f"Recipe {path} cannot be read: {error.strerror}. See trainer/recipes/."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"Recipe {path} is not valid TOML: {error}.") from error


def _parse(text: str) -> Any:
    """A value written as in TOML; anything that is not TOML is taken as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build_recipe(kind: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """A recipe from decoded TOML; BadInputError, opening with `source`, for unknown keys and wrong types."""
    hints = get_type_hints(kind)
    values = with_new_keys(kind, values)
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
