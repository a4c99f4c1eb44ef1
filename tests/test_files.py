import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt5_core.files import put, restore, whole_folder

ROOT = Path(__file__).parents[1]


def write(folder: Path, name: str) -> None:
    with whole_folder(folder) as draft:
        (draft / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_with_its_parents_and_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "new")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["new"]


def test_a_full_folder_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    write(tmp_path / "a", "new")
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_what_was_there_stays_when_the_block_fails(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as draft:
        (draft / "new").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"]


def test_what_was_there_comes_back_when_the_draft_cannot_move(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "a") as draft:
        draft.rmdir()
    assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interruption_after_any_renaming_leaves_one_whole_folder(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> None:
        calls.append(target)
        if moved == 0 and len(calls) == 1:
            raise KeyboardInterrupt
        rename(path, target)
        if len(calls) == moved:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", "new")
    assert names(tmp_path / "a") == ["new" if moved == 2 else "old"]
    assert names(tmp_path) == ["a"]


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


KILLED = """
import os, sys
from pathlib import Path
from minigpt5_core.files import whole_folder

rename, calls = Path.rename, []

def killed(path, target):
    if len(calls) == moved:
        os._exit(9)  # as kill -9: nothing is tidied up
    calls.append(target)
    rename(path, target)
    if len(calls) == moved == 2:
        os._exit(9)

folder, moved = Path(sys.argv[1]), int(sys.argv[2])
Path.rename = killed
with whole_folder(folder) as draft:
    (draft / "new").write_text("new")
"""


@pytest.mark.parametrize(("moved", "kept"), [(0, "old"), (1, "new"), (2, "new")])
def test_killed_between_any_renamings_the_folder_is_whole_again_once_it_is_asked_for(
    moved: int, kept: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), str(moved)], cwd=ROOT)
    assert killed.returncode == 9
    restore(tmp_path / "a")
    assert names(tmp_path / "a") == [kept]
    left = [path for path in tmp_path.iterdir() if path.name != "a"]
    assert len(left) == (moved == 0)  # the draft of somebody who may still be writing
    for draft in left:
        os.utime(draft, (0, 0))
    restore(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    for name in (".ab.1.old", ".a.old", "a.1.old", ".a.1.older"):
        (tmp_path / name).mkdir()
    restore(tmp_path / "a")
    assert names(tmp_path) == sorted([".ab.1.old", ".a.old", "a.1.old", ".a.1.older"])


def test_a_file_takes_its_place_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", b"old")

    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]
