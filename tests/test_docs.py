"""What the documents say is where, is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = (
    "minigpt5_core",
    "trainer",
    "tests",
    "nodes",
    "benchmarks",
    "docs",
    "storybook",
    "web",
    "locales",
    "workflows",
)
WRITTEN = re.compile(
    rf"(?<![\w/])(?:{'|'.join(ROOMS)})/[\w./-]+(?:\.py|\.toml|\.json|\.md|\.html|\.png|/)(?!\w)"
)
GONE = {
    "trainer/storybook/benchmark/reference_attention.py",
    "tests/test_consistency.py",
}  # docs/findings.md says so


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_of_ours_that_a_page_names_is_there(page: Path) -> None:
    named = set(WRITTEN.findall(page.read_text(encoding="utf-8"))) - GONE
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_walk_names_every_room_of_the_trainer() -> None:
    text = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    rooms = [path.name for path in (ROOT / "trainer").iterdir() if (path / "__init__.py").is_file()]
    assert [room for room in rooms if f"`{room}/`" not in text] == []
