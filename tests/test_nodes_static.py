"""What ships into a stranger's ComfyUI runs no code from files, starts no programs and loads no trainer's libraries.

Read from the source, as the registry's scan does. (tests/test_layers.py: who may import whom.)
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "minigpt5_core"
NODES = sorted((ROOT / "nodes").rglob("*.py"))
SHIPPED = [ROOT / "__init__.py", *NODES, *sorted(CORE.rglob("*.py"))]
TRAINERS = {"diffusers", "peft", "accelerate"}
# The core's files that need a trainer's library, at the top or inside a function: for Python and the shell alone.
NOT_FOR_NODES = {name: {"diffusers"} for name in ("cli.py", "diffusion.py", "model_index.py", "pipeline.py")}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "breakpoint", "input",
    "os.system", "os.popen", "os.execv", "os.spawnl", "os.startfile", "os.fork",
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load",
    "importlib.import_module",
}  # fmt: skip
FORBIDDEN_IMPORTS = {
    "subprocess", "multiprocessing", "pty", "ctypes", "runpy", "code",
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
    "pip", "ensurepip", "setuptools", "pkg_resources",
    "socket", "ssl", "http", "urllib", "urllib3", "requests", "aiohttp", "httpx", "ftplib", "huggingface_hub",
}  # fmt: skip


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a name or an attribute of one, otherwise nothing before the last dot."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that are imported absolutely, anywhere in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def dangers(tree: ast.AST) -> set[str]:
    """Forbidden calls, imports, and names taken out of a module to be called bare."""
    taken = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    called = {name for name, _ in calls(tree)}
    return (called | taken) & FORBIDDEN_CALLS | imported(tree) & FORBIDDEN_IMPORTS


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the machine prefers."""
    lines = []
    for name, call in calls(tree):
        method = name.rsplit(".", 1)[-1]
        mode = next((key.value for key in call.keywords if key.arg == "mode"), None)
        mode = mode or (call.args[1] if name == "open" and len(call.args) > 1 else None)
        binary = isinstance(mode, ast.Constant) and "b" in mode.value
        given = [key.value for key in call.keywords if key.arg == "encoding"]
        right = any(isinstance(value, ast.Constant) and value.value == "utf-8" for value in given)
        is_text = name == "open" and not binary or method in ("read_text", "write_text")
        lines += [call.lineno] if is_text and not right else []
    return lines


def core_files_of(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Files of the core that a file of `package`, such as ("minigpt5_core", "llm"), imports by relative imports."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        place = "/".join(base).strip("/")
        for one in (place, *(f"{place}/{alias.name}" for alias in node.names)):
            found |= {name for name in (f"{one}.py", f"{one}/__init__.py") if (ROOT / name).is_file()}
    return {name.removeprefix(f"{CORE.name}/") for name in found if name.startswith(f"{CORE.name}/")}


def packages_above(name: str) -> set[str]:
    """The __init__.py files that run before a file of the core does."""
    return {f"{parent.as_posix()}/__init__.py" for parent in Path(name).parents if parent != Path()}


def reached_by_nodes() -> set[str]:
    """All files of the core that a node may come to import, by whatever way."""
    reached: set[str] = set()
    new = set().union(*(core_files_of(tree_of(path), ("nodes",)) for path in NODES))
    while new:
        new |= set().union(*map(packages_above, new))
        reached |= new
        imports = (core_files_of(tree_of(CORE / name), (CORE.name, *Path(name).parts[:-1])) for name in new)
        new = set().union(*imports) - reached
    return reached


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_that_ships_runs_code_from_files_or_reaches_out(path):
    assert not dangers(tree_of(path))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_text_is_utf_8_on_every_machine(path):
    assert not without_encoding(tree_of(path))


@pytest.mark.parametrize("path", NODES, ids=name_of)
def test_the_nodes_source_is_plain_ascii(path):
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("path", NODES, ids=name_of)
def test_a_node_needs_no_trainers_library(path):
    assert not imported(tree_of(path)) & TRAINERS


def test_the_files_of_the_core_that_need_one_are_these():
    needs = {
        path.relative_to(CORE).as_posix(): imported(tree_of(path)) & TRAINERS for path in CORE.rglob("*.py")
    }
    assert {name: found for name, found in needs.items() if found} == NOT_FOR_NODES


def test_no_node_comes_to_import_one_of_them():
    reached = reached_by_nodes()
    wanted = {
        "generate/decode.py",
        "conditioning/mapper.py",
        "story/pages.py",
        "llm/adapter.py",
        "llm/__init__.py",
    }
    assert wanted <= reached  # the search finds its way
    assert not reached & set(NOT_FOR_NODES)


# The readers themselves


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("eval('1')", {"eval"}),
        ("import os\nos.system('ls')", {"os.system"}),
        ("from os import system\nsystem('ls')", {"os.system"}),
        ("def f():\n    import subprocess as s", {"subprocess"}),
        ("from urllib.request import urlopen", {"urllib"}),
        ("torch.load(path, weights_only=True)", {"torch.load"}),
        ("model.eval()\nmapper.load(path)\nfrom .pickle import a", set()),
    ],
)
def test_a_danger_is_seen(code, found):
    assert dangers(ast.parse(code)) == found


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("open(a)", [1]),
        ("open(a, 'w', encoding='latin-1')", [1]),
        ("open(a, 'rb')\nopen(a, mode='wb')\nopen(a, encoding='utf-8')", []),
        ("a\npath.read_text()\n(folder / b).write_text(c)", [2, 3]),
        ("path.write_text(a, encoding='utf-8')\nImage.open(a)", []),
    ],
)
def test_text_without_its_encoding_is_seen(code, lines):
    assert without_encoding(ast.parse(code)) == lines


def test_ways_into_the_core_are_seen():
    code = (
        "from ..minigpt5_core.llm.load import a\nfrom ..minigpt5_core import cli\nfrom .story import Story\n"
    )
    assert core_files_of(ast.parse(code), ("nodes",)) == {"__init__.py", "llm/load.py", "cli.py"}
    code = "from ..story import Story\nfrom . import frozen\nfrom ..errors import a"
    found = core_files_of(ast.parse(code), ("minigpt5_core", "llm"))
    assert found == {"story/__init__.py", "llm/__init__.py", "llm/frozen.py", "errors.py"}
