"""Runs parity.py on the committed copy of the published code's results, and on copies with one number changed."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    with tarfile.open(ROOT / "tests/fixtures/parity.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_parity(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests/parity.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_everything_the_published_code_computed_is_computed_here_too(fixtures):
    result = run_parity(fixtures)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(line.endswith("  ok") for line in lines)
    names = {line.split()[1] for line in lines}
    for stage in ("stage1", "stage2"):
        with safe_open(fixtures / stage / "expected.safetensors", framework="pt") as opened:
            results = {name for name in opened.keys() if name.startswith(("out.", "grad.", "gen."))}  # noqa: SIM118
        assert results | {"in.input_ids", "in.labels", "in.attention_mask", "vision.image_embeds"} <= names


@pytest.mark.parametrize(
    ("name", "change"),
    [("vision.image_embeds", 2e-4), ("gen.free.tokens", 1), ("grad.t2i_decoder_prompt", 1e-6)],
)
def test_one_number_that_is_off_is_named_and_fails(fixtures, tmp_path, name, change):
    folder = tmp_path / "changed"
    shutil.copytree(fixtures, folder, ignore=shutil.ignore_patterns("stage2"))
    path = folder / "stage1/expected.safetensors"
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += change
    save_file(tensors, path, header)
    result = run_parity(folder)
    assert result.returncode == 1
    assert [line.split()[1] for line in result.stdout.splitlines() if line.endswith("OUT")] == [name]


def test_a_folder_without_fixtures_is_bad_input_and_no_traceback(tmp_path):
    result = run_parity(tmp_path)
    assert result.returncode == 2
    assert "holds no stage*/expected.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
