"""Frozen dataclasses stored in files; what a file says is checked before anything is built from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar, get_origin, get_type_hints

from .errors import BadInputError
from .sizes import check_sizes

Stored = TypeVar("Stored")


@dataclass(frozen=True)
class MapperConfig:
    """Everything that rebuilds a mapper: (B, vokens, llm_width) -> (B, tokens, width) and (B, pooled_width).

    `hidden` is the width inside; the reference mapper works in the conditioning width itself. `layers` counts
    the encoder's and the decoder's layers each. Raises BadInputError for sizes that cannot be built.
    """

    kind: str
    vokens: int
    llm_width: int
    tokens: int
    width: int
    hidden: int
    heads: int
    layers: int
    feed_forward: int
    pooled_width: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if isinstance(value, int) and value < 1:
                raise BadInputError(f"Mapper config: {name} is {value}; it must be 1 or more.")
        check_sizes(self.to_dict(), "Mapper config")
        if self.hidden % self.heads:
            raise BadInputError(
                f"Mapper config: hidden {self.hidden} cannot be split over {self.heads} heads; "
                "choose a hidden width that the number of heads divides."
            )

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MapperConfig:
        """The config a file holds; raises BadInputError for unknown or missing keys and wrong types."""
        return build(cls, values, "Mapper config")


def build(kind: type[Stored], values: Any, source: str) -> Stored:
    """An instance of the dataclass `kind` from a decoded JSON object; `source` begins every error message.

    Raises BadInputError for anything but an object with exactly the known keys and their types.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise BadInputError(
            f"{source}: found {type(values).__name__}, expected an object with {_names(hints)}."
        )
    if unknown := set(values) - set(hints):
        raise BadInputError(f"{source}: unknown key {_quoted(unknown)}. Valid keys: {_names(hints)}.")
    if missing := _required(kind) - set(values):
        raise BadInputError(f"{source}: missing key {_quoted(missing)}. Valid keys: {_names(hints)}.")
    for name, value in values.items():
        expected = _checkable(hints[name])
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise BadInputError(f"{source}: {name} is {value!r}, expected {_label(expected)}.")
    return kind(**values)


def _required(kind: type) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def _checkable(hint: Any) -> Any:
    """The type that isinstance takes for a hint: it refuses `dict[str, int]`, but not `dict` and `int | None`."""
    origin = get_origin(hint)
    return origin if origin in (dict, list, tuple) else hint


def _label(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))


def _quoted(names: Any) -> str:
    return ", ".join(sorted(map(repr, names)))
