"""Every node has its help page, and its texts in every language."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LANGUAGES = ["en", "zh"]
PROPER_NAMES = {"LLM", "VAE", "CFG", "Top-p", "Top-k", "Latent", "CLIP", "voken"}
NODES = sorted(
    name
    for file in (ROOT / "nodes").glob("*.py")
    for name in re.findall(r'node_id="(MiniGPT5\w+)"', file.read_text(encoding="utf-8"))
)


def locale(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(value, path=()):
    """All texts of a locale with their places."""
    if isinstance(value, str):
        return {path: value}
    return {place: text for key, item in value.items() for place, text in leaves(item, (*path, key)).items()}


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_names_every_input_and_output(node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    texts = locale("en")[node]
    inputs, outputs = page.split("## Inputs")[1].split("## Outputs")
    shown = [re.findall(r"^- \*\*(.+?)\*\* \(", part, re.MULTILINE) for part in (inputs, outputs)]
    assert shown[0] == [about["name"] for about in texts["inputs"].values()]
    assert shown[1] == [about["name"] for about in texts["outputs"].values()]


@pytest.mark.parametrize("node", NODES)
def test_the_locale_has_the_inputs_and_outputs_that_the_node_has(node):
    pinned = json.loads((ROOT / "tests" / "node_inputs.json").read_text(encoding="utf-8"))[node]
    texts = locale("en")[node]
    assert sorted(texts["inputs"]) == sorted(entry.split()[0] for entry in pinned["inputs"])
    assert list(texts["outputs"]) == [str(index) for index in range(len(pinned["outputs"]))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_locale_has_every_text_of_every_node(language):
    texts = leaves(locale(language))
    assert sorted({place[0] for place in texts}) == NODES
    assert texts.keys() == leaves(locale("en")).keys()
    assert all(text.strip() for text in texts.values())


def test_chinese_texts_are_chinese():
    for place, text in leaves(locale("zh")).items():
        assert re.search("[一-鿿]", text) or text in PROPER_NAMES, place


def test_there_are_no_pages_of_nodes_that_are_gone():
    assert sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")) == NODES
