"""python -m minigpt5_core: see `cli`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
