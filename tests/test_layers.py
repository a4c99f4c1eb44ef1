"""Imports point one way, nodes -> minigpt5_core <- trainer, and nothing edits sys.path."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
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


# The rooms of the core, each of which imports those before it alone; a file on top is a room of its own.
CORE_ROOMS = (
    "errors", "terminal", "texts", "sizes", "versions", "config", "files", "inside", "rasters", "own_code",
    "model_index", "reading", "tensor_files", "whole_models", "vokens", "losses", "metrics",
    "conditioning", "vision", "llm", "generate", "story", "diffusion", "pipeline", "published", "cli", "__main__",
)  # fmt: skip
CORE_FILES = [
    path
    for path in sorted((ROOT / "minigpt5_core").rglob("*.py"))
    if path != ROOT / "minigpt5_core" / "__init__.py" and "old_paths" not in path.parts
]


def imports_at_run_time(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """All imports from a module, less those that are for the type checker alone."""
    if isinstance(tree, ast.ImportFrom):
        yield tree
    elif not (isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(tree):
            yield from imports_at_run_time(child)


def imported_files(path: Path) -> set[Path]:
    """The files that one imports relatively, anywhere in it; a package counts as its __init__.py."""
    found = set()
    for node in imports_at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for place in (base, *(base / alias.name for alias in node.names)):
                found |= {one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()}
    return found - {path}


def room_of(path: Path, package: str) -> str:
    """The folder or file right inside the package."""
    return path.relative_to(ROOT / package).with_suffix("").parts[0]


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_of_the_core_runs_back_up(path: Path) -> None:
    own = CORE_ROOMS.index(room_of(path, "minigpt5_core"))
    files = imported_files(path) - {ROOT / "minigpt5_core" / "__init__.py"}
    found = {room_of(file, "minigpt5_core") for file in files}
    assert all(CORE_ROOMS.index(room) <= own for room in found), found


def test_the_files_of_the_core_import_each_other_in_no_circle() -> None:
    assert list(TopologicalSorter({path: imported_files(path) for path in CORE_FILES}).static_order())


def test_every_file_of_the_core_is_in_a_package_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "minigpt5_core").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(project["tool"]["setuptools"]["packages"])


def test_the_reader_of_files_leaves_out_what_is_for_the_type_checker_alone(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "room/__init__.py", "room/c.py", "room/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "room" / "d.py").write_text(
        "from typing import TYPE_CHECKING\nfrom . import c\nif TYPE_CHECKING:\n    from ..a import x\n"
        "def f():\n    from ..b import y\n"
    )
    found = {path.relative_to(tmp_path).as_posix() for path in imported_files(tmp_path / "room" / "d.py")}
    assert found == {"room/__init__.py", "room/c.py", "b.py"}


# The rooms of the trainer, in the same order; the storybook is a guest, with rooms of its own.
TRAINER_ROOMS = (
    "common", "convert", "metrics", "ab", "worlds", "data", "diffusion", "llm", "feature_cache", "training",
    "evaluation", "stages", "storybook/world", "storybook/models", "storybook/benchmark", "cli", "__main__",
)  # fmt: skip
TITLES = {
    ROOT / "trainer" / "__init__.py",
    ROOT / "trainer" / "storybook" / "__init__.py",
}  # a docstring at most
TRAINER_FILES = sorted(set((ROOT / "trainer").rglob("*.py")) - TITLES)


def trainer_room(path: Path) -> str:
    """The folder right inside the trainer, or inside its storybook."""
    room = room_of(path, "trainer")
    return room if room != "storybook" else f"storybook/{room_of(path, 'trainer/storybook')}"


@pytest.mark.parametrize("path", TRAINER_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_of_the_trainer_runs_back_up(path: Path) -> None:
    own = TRAINER_ROOMS.index(trainer_room(path))
    found = {trainer_room(file) for file in imported_files(path) - TITLES}
    assert all(TRAINER_ROOMS.index(room) <= own for room in found), found


def test_the_files_of_the_trainer_import_each_other_in_no_circle() -> None:
    graph = {path: imported_files(path) - {path.with_name("__init__.py")} for path in TRAINER_FILES}
    assert list(TopologicalSorter(graph).static_order())


def test_nothing_but_the_command_line_knows_the_storybook() -> None:
    guest = ROOT / "trainer" / "storybook"
    general = [path for path in TRAINER_FILES if guest not in path.parents and path.name != "cli.py"]
    assert [path for path in general if any(guest in file.parents for file in imported_files(path))] == []
    assert [path for path in general if "trainer.storybook" in path.read_text(encoding="utf-8")] == []


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
