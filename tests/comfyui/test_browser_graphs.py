"""What the real frontend makes of bypassed and muted nodes and of subgraphs, run on the real server."""

import pytest

from tests.chromium import needs_chromium

from .test_browser import load, read_workflow
from .test_browser import open_page as open_page  # the fixture
from .test_browser_reader import command

pytestmark = needs_chromium

MUTED, BYPASSED = 2, 4
BY_HAND, QUICKSTART = "Storybook by hand", "Storybook quickstart"
TURN, ADD = "MiniGPT5StoryTurn", "MiniGPT5AddPicture"
OF_A_SCENE = (TURN, "MiniGPT5VokensToConditioning", "KSampler", "VAEDecode", ADD)


@pytest.fixture
def page(open_page):  # noqa: F811
    return open_page()


def prompt_of(page):
    """What the frontend would queue, made short."""
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in prompt.values():
        short = {"steps": 2, "max_new_tokens": 24, "scenes": 2, "seed": 341}
        node["inputs"] |= {name: value for name, value in short.items() if name in node["inputs"]}
    return prompt


def without(page, workflow, mode, *nodes):
    """The prompt of a shared workflow in which nodes, (class, which of them) each, are muted or bypassed."""
    graph = read_workflow(workflow)
    for kind, which in nodes:
        of_kind = sorted(
            (node for node in graph["nodes"] if node["type"] == kind), key=lambda node: node["id"]
        )
        of_kind[which]["mode"] = mode
    load(page, graph)
    page.wait_for_timeout(500)
    return prompt_of(page)


def told(server, prompt):
    """The pages that were told, by Save Story or View Story, whichever there is."""
    result = server.run(prompt)
    assert result.status == "success", result.error
    ends = ("MiniGPT5SaveStory", "MiniGPT5ViewStory")
    shown = next(name for kind in ends for name, node in prompt.items() if node["class_type"] == kind)
    return result.outputs[shown]["minigpt5_pages"]


def test_a_bypassed_node_hands_on_what_came_in(page, server):
    by_hand = lambda *nodes: told(server, without(page, BY_HAND, BYPASSED, *nodes))  # noqa: E731
    assert [bool(one["picture"]) for one in by_hand((ADD, 1))] == [True, False, True]
    assert len(by_hand(*((kind, 1) for kind in OF_A_SCENE))) == 2
    assert len(by_hand(("MiniGPT5LoadAdapter", 0), ("MiniGPT5ViewStory", 0))) == 3
    opening = without(page, QUICKSTART, BYPASSED, ("MiniGPT5Interleaver", 0))
    assert told(server, opening) == []


def test_a_muted_node_is_left_out_and_what_hangs_on_it_is_refused_by_its_input(page, server):
    assert len(told(server, without(page, BY_HAND, MUTED, ("MiniGPT5SaveStory", 0)))) == 3
    for muted, missing in (((TURN, 1), "vokens"), (("MiniGPT5LoadMapper", 0), "mapper")):
        result = server.run(without(page, BY_HAND, MUTED, muted))
        assert result.status == "refused"
        assert "Required input is missing" in result.error and f'"{missing}"' in result.error


def test_an_interleaver_in_a_subgraph_is_run_from_there(page, server):
    plain = told(server, without(page, QUICKSTART, BYPASSED))
    ids = "window.app.graph.nodes.filter(node => node.type === 'MiniGPT5Interleaver')"
    page.evaluate(f"window.app.canvas.selectItems({ids})")
    command(page, "Comfy.Graph.ConvertToSubgraph")
    prompt = prompt_of(page)
    assert any(":" in name and node["class_type"] == "MiniGPT5Interleaver" for name, node in prompt.items())
    assert [page["text"] for page in told(server, prompt)] == [page["text"] for page in plain]
