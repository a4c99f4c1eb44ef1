"""python -m minigpt5_core: see `cli`."""

from collections.abc import Callable

from .console import run


def _load() -> Callable[[], int]:
    from .cli import main

    return main


if __name__ == "__main__":
    raise SystemExit(run(_load))
