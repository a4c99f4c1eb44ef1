"""The commands at terminals and in pipes of every kind."""

import os
import subprocess
import sys

import pytest

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm.files import default_folder
from minigpt5_core.terminal import CLOSED, INTERRUPTED, run

TRAINER = [sys.executable, "-m", "trainer", "data", "check"]


def test_letters_that_the_output_cannot_show_are_written_out(tmp_path):
    folder = tmp_path / "é"
    folder.mkdir()
    (folder / "é.jsonl").write_text('{"items": [{"text": "é"}]}\n{"x"\n', encoding="utf-8")
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    for path, code in ((folder / "é.jsonl", 0), (folder / "è", 2)):
        command = [*TRAINER, str(path), "--format", "jsonl"]
        ran = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert ran.returncode == code and "Traceback" not in ran.stderr and "\\xe9" in ran.stdout + ran.stderr


def test_a_reader_that_has_gone_ends_the_command_quietly(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x"\n' * 50)
    reads, writes = os.pipe()
    os.close(reads)
    ran = subprocess.run(
        [*TRAINER, str(tmp_path / "a.jsonl"), "--format", "jsonl"],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (ran.returncode, ran.stderr) == (CLOSED, "")


def test_ctrl_c_while_python_imports_is_one_word(capsys):
    def importing():
        raise KeyboardInterrupt

    assert run(importing) == INTERRUPTED and capsys.readouterr().err == "Interrupted.\n"
    assert run(lambda: lambda: 3) == 3


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("minigpt5_core.llm.files.Path.home", home)
    with pytest.raises(BadInputError, match="no home folder.*Set HOME, or XDG_CACHE_HOME"):
        default_folder()
