"""Recipes: TOML files read into frozen dataclasses; a key nobody knows is refused, any value can be set by hand."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minigpt5_core.errors import BadInputError

Recipe = TypeVar("Recipe")


def load_recipe(kind: type[Recipe], path: Path | None, changes: list[str]) -> Recipe:
    """The recipe at `path`, with `key=value` changes laid over it; `kind`'s defaults fill the rest.

    Raises BadInputError for a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    values = _read(path) if path else {}
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
        place[name] = _parse(value.strip())
    return _build(kind, values, str(path) if path else "--set")


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


def _build(kind: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise BadInputError(
            f"{source}: unknown key {', '.join(map(repr, unknown))}. Valid keys: {', '.join(sorted(hints))}."
        )
    missing = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    if missing:
        raise BadInputError(f"{source}: missing key {', '.join(map(repr, missing))}.")
    return kind(**{key: _coerce(value, hints[key], key, source) for key, value in values.items()})


def _coerce(value: Any, expected: Any, key: str, source: str) -> Any:
    name = str(getattr(expected, "__name__", expected))
    if isinstance(expected, type) and dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return _build(expected, value, f"{source}: {key}")
    if name.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and (
        not isinstance(value, expected) or (expected is int and isinstance(value, bool))
    ):
        raise BadInputError(f"{source}: {key} = {value!r} should be of type {name}.")
    return value
