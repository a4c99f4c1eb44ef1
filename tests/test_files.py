from pathlib import Path

import pytest

from minigpt5_core.files import whole_folder


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
