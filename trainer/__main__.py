"""`python -m trainer`, from the repository's folder."""

from collections.abc import Callable

from minigpt5_core.console import run


def _load() -> Callable[[], int]:
    from .cli import main

    return main


if __name__ == "__main__":
    raise SystemExit(run(_load))
