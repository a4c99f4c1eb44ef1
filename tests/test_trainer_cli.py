import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_help_answers_without_importing_torch():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "stage 1: captions to pictures" in shown.stdout
    assert "torch" not in shown.stderr  # which takes seconds: without it, help comes at once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "--set", "stepz=3"], "unknown key 'stepz'. Valid keys: accumulation, batch"),
        (["finetune", "--set", "steps"], "has no '='"),
        (["align", "--recipe", "none.toml"], "cannot be read"),
        (["storybook", "--set", "split=dev"], "split is 'dev'; it can be train or test"),
        (["storybook-diffusion", "--from", "nowhere"], "is not a diffusers folder"),
        (
            ["storybook-score", "--set", "scorer=none.safetensors", "--set", "mapper=none.safetensors"],
            "none.safetensors",
        ),
    ],
)
def test_bad_input_is_a_message_and_code_2(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_the_storybook_command_writes_stories_and_pictures(tmp_path):
    assert main(["storybook", "--out", str(tmp_path / "sample"), "--set", "stories=2"]) == 0
    lines = (tmp_path / "sample" / "stories.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert len(list((tmp_path / "sample" / "pictures").iterdir())) == sum(
        line.count('"caption"') for line in lines
    )
