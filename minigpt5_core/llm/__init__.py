"""The frozen LLM, and what is added to it: adapters, a prefix, vision.

The names below are loaded with the first of them that is used: `transformers` takes seconds to import, and the command
line needs `files` and `precision` alone before it does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..reading import UNREADABLE, reading
    from .frozen import MOST_SEEN, FrozenLLM
    from .load import DTYPE, add_vokens, has_vision_files, load_adapter, load_llm, load_vision
    from .load import has_vision_files as has_sight
    from .load import load_vision as load_sight

__all__ = [
    "DTYPE",
    "MOST_SEEN",
    "UNREADABLE",
    "FrozenLLM",
    "add_vokens",
    "has_sight",
    "has_vision_files",
    "load_adapter",
    "load_llm",
    "load_sight",
    "load_vision",
    "reading",
]


_OLD_NAMES = {"has_sight": "has_vision_files", "load_sight": "load_vision"}


def __getattr__(name: str) -> Any:
    name = _OLD_NAMES.get(name, name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import reading
    from . import frozen, load

    return next(getattr(module, name) for module in (frozen, load, reading) if hasattr(module, name))
