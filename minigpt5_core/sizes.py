"""Sizes that a file says, checked before anything is built of them: a number costs nothing to write."""

import re
from typing import Any

from .errors import BadInputError

LARGEST = 10**7  # of a width, a vocabulary, a picture's side; no model comes near
MOST_LAYERS = 1000
COUNTS = re.compile(r"(layers?|blocks?|depths?|stages?|experts)(_per_block)?$")


def check_sizes(values: dict[str, Any], source: str) -> None:
    """BadInputError, opening with `source`, for a whole number among our own sizes that nothing could be built of."""
    for name, value in values.items():
        most = MOST_LAYERS if COUNTS.search(name) else LARGEST
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, int) and one > most:
                raise _too_large(source, name, one, most)


def check_counts(config: Any, source: str) -> None:
    """BadInputError for a model's configuration that asks for more layers than any model has, in any of its parts: they
    are made one by one."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        for name, value in part.items() if isinstance(part, dict) else ():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int) and one > MOST_LAYERS and COUNTS.search(name):
                    raise _too_large(source, name, one, MOST_LAYERS)


def _too_large(source: str, name: str, value: int, most: int) -> BadInputError:
    said = str(value) if value < 10**12 else "more than a million million"
    return BadInputError(
        f"{source}: {name} is {said}, at most {most:,} can be. The file is damaged: copy it again."
    )
