"""python -m minigpt5_core: see `cli`."""

from collections.abc import Callable

from .terminal import run


def _main() -> Callable[[], int]:
    from .cli import main

    return main


if __name__ == "__main__":
    raise SystemExit(run(_main))
