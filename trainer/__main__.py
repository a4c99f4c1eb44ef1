"""`python -m trainer`, from the repository's folder."""

from collections.abc import Callable

from minigpt5_core.terminal import run


def _main() -> Callable[[], int]:
    from .cli import main

    return main


raise SystemExit(run(_main))
