"""What a result depends on: recipe, versions, commit, and a fingerprint of the data."""

import hashlib
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("minigpt5", "torch", "transformers", "diffusers", "peft", "accelerate", "datasets")


EDGE = 2**20  # of each file of a data set, so much from the beginning and the end is looked at


def describe(recipe: Any, stage: str, data_name: str, data: Path | None) -> dict[str, Any]:
    """All that a run depends on; `data` is the data set's file or folder, None for one that is drawn by rule."""
    return {
        "stage": stage,
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
        "commit": _commit(),
        "data": {"name": data_name, "fingerprint": fingerprint(data) if data else ""},
    }


def fingerprint(path: Path) -> str:
    """Stands for the files of a data set: names, sizes, and the beginning and end of each."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if not file.is_file():
            return ""
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(EDGE))
            content.seek(max(0, size - EDGE))
            digest.update(content.read(EDGE))
    return digest.hexdigest()[:16]


def package_version(package: str) -> str:
    """As it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit this code is at, with a + where it was changed since; empty outside of a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip()
