"""Imports point one way, nodes -> minigpt5_core <- trainer, and nothing edits sys.path."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "minigpt5_core": {"nodes", "trainer"},
    "trainer": {"nodes"},
    "nodes": {"trainer"},
}


def sources() -> list[Path]:
    found = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]
    return [ROOT / "__init__.py", *found]


def imported_rooms(path: Path) -> set[str]:
    """The top-level packages that a file imports; a relative import counts as the room it reaches."""
    package = path.relative_to(ROOT).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [*base, *(node.module or "").split(".")] if node.module else list(base)
            rooms |= {names[0]} if names else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_import_the_rooms_it_must_not_know(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert not imported_rooms(path) & FORBIDDEN[room], path


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_edits_sys_path(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    touched = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_sys_path(node)
    ]
    assert not touched


def is_sys_path(node: ast.Attribute) -> bool:
    return node.attr == "path" and isinstance(node.value, ast.Name) and node.value.id == "sys"


def test_the_reader_of_imports_sees_through_relative_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "trainer" / "deep").mkdir(parents=True)
    path = tmp_path / "trainer" / "deep" / "file.py"
    path.write_text(
        "from ... import nodes\nfrom ..config import x\nfrom ...minigpt5_core.a import b\nimport os.path\n"
    )
    assert imported_rooms(path) == {"nodes", "trainer", "minigpt5_core", "os"}


# What the packages of pyproject.toml's `dependencies` bring along under names of their own.
BROUGHT = {"PIL", "huggingface_hub", "packaging", "tokenizers"}
FOR_THE_TRAINER = "published.py"  # reads a sentencepiece file, which only a conversion has


def test_the_core_imports_nothing_that_a_story_is_not_installed_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=\[ ]", one)[0] for one in project["dependencies"]} | {"gguf"}
    known = named | BROUGHT | set(sys.stdlib_module_names) | {"minigpt5_core"}
    files = [path for path in (ROOT / "minigpt5_core").rglob("*.py") if path.name != FOR_THE_TRAINER]
    assert {path.name: extra for path in files if (extra := imported_rooms(path) - known)} == {}
    readers = [path.name for path in files if re.search(r"from \.+published import", path.read_text())]
    assert readers == []
