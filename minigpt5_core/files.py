"""Folders written whole: everything goes into a draft beside the target, which then takes its place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty draft folder; it replaces `folder` when the block ends, and vanishes if the block fails.

    Whoever reads `folder` sees all of the old content or all of the new. OSError where nothing can be written.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        _take_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draft_of(target: Path) -> Path:
    """Where the draft of the resolved folder `target` is written: beside it, so that it only needs renaming."""
    return target.parent / f".{target.name}.{os.getpid()}.new"


def _take_place(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; a folder cannot be renamed over a full one, so the old one steps aside."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.rename(old)
        draft.rename(target)
    finally:  # an interruption may come between any two lines, so only what is on the disk counts
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
