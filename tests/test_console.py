"""How a command line begins and ends, in processes of their own where a pipe or an encoding is what matters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt5_core.console import run
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm.files import default_folder

ROOT = Path(__file__).parents[1]
TALKS = """
from minigpt5_core.console import run

def main():
    for number in range(100_000):
        print("caf\\u00e9", number)
    return 0

raise SystemExit(run(lambda: main))
"""


def start(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_commands_own_code_comes_back() -> None:
    assert run(lambda: lambda: 2) == 2


def test_ctrl_c_counts_from_the_first_import_on(capsys: pytest.CaptureFixture) -> None:
    def load() -> None:
        raise KeyboardInterrupt

    assert run(load) == 130  # type: ignore[arg-type]
    assert capsys.readouterr().err == "Interrupted.\n"


def test_whoever_reads_may_stop_reading() -> None:
    process = start(TALKS, PYTHONIOENCODING="utf-8")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().decode() == f"café 0{os.linesep}"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_a_terminal_without_a_letter_shows_its_number() -> None:
    code = TALKS.replace("100_000", "1")
    out, err = start(code, PYTHONIOENCODING="ascii").communicate()
    assert (out.decode().strip(), err) == (r"caf\xe9 0", b"")


@pytest.mark.parametrize(
    "command",
    [
        ["minigpt5_core", "Mia", "--out", "/proc/ö"],
        ["trainer", "align", "--recipe", "ö.toml", "--out", "runs/never"],
    ],
)
def test_the_real_commands_begin_and_end_so(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert r"\xf6" in done.stderr and "Traceback" not in done.stderr


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(BadInputError, match="Set HOME or XDG_CACHE_HOME"):
        default_folder()
