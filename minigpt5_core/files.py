"""Folders written whole: everything goes into a draft beside the target, which then takes its place."""

import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 3600.0  # seconds since anything changed in a draft that nobody is taken to be writing any more


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty draft folder; it replaces `folder` when the block ends, and vanishes if the block fails.

    Whoever reads `folder` sees all of the old content or all of the new. OSError where nothing can be written.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    restore(target)
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


def restore(folder: Path) -> None:
    """Finishes what a process that was killed has left beside `folder`, which then is whole again.

    Killed between the two renamings, it has left no `folder`, and a draft that was ready; the draft takes its place.
    """
    target = folder.resolve()
    with suppress(OSError):  # where nothing may be renamed there is nothing to mend
        for old in _beside(target, "old"):
            if not target.exists():
                draft = old.with_suffix(".new")
                (draft if draft.is_dir() else old).rename(target)
            shutil.rmtree(old, ignore_errors=True)
        for draft in _beside(target, "new"):
            if time.time() - draft.stat().st_mtime > ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _beside(target: Path, kind: str) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.*.{kind}"))


def put(file: Path, content: bytes) -> None:
    """Writes a file in one step, in the place of an earlier one. OSError where the disk refuses."""
    part = part_of(file)
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def part_of(file: Path) -> Path:
    """Where a file is written before it takes its place."""
    return file.with_name(f".{file.name}.part")
