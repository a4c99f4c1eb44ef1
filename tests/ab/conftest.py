"""A study of two systems of six stories."""

from pathlib import Path

import pytest

from tests.ab.studies import SECRETS, write_system
from trainer.ab.build import build_study


@pytest.fixture
def systems(tmp_path: Path) -> tuple[Path, Path]:
    return write_system(tmp_path / "in", SECRETS[0]), write_system(tmp_path / "in", SECRETS[1])


@pytest.fixture
def folder(tmp_path: Path, systems: tuple[Path, Path]) -> Path:
    build_study(*systems, tmp_path / "study")
    return tmp_path / "study"
