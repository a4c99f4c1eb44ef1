"""The story reader in a real browser: what was told is there again, and subgraphs do not stand in its way."""

import pytest

from tests.chromium import needs_chromium

from .test_browser import keep, load, page_of_own, read_workflow, run, set_widgets, wait_for_end
from .test_browser import open_page as open_page  # the fixture

pytestmark = needs_chromium

STORY, VIEW = 2, 3  # in the workflow of page_of_own
EVERY_NODE = "[window.app.graph, ...window.app.graph.subgraphs.values()].flatMap(graph => graph.nodes)"


def command(page, name):
    page.evaluate("name => window.app.extensionManager.command.execute(name)", name)
    page.wait_for_timeout(1000)


def read(page):
    """The texts in the view node's reader, wherever it is."""
    node = f"{EVERY_NODE}.find(node => node.type === 'MiniGPT5ViewStory')"
    return page.evaluate(f"{node}?.storyReader.pages.map(page => page.text)")


def wait_to_read(page, text):
    for _ in range(60):
        if read(page) == [text]:
            return
        page.wait_for_timeout(250)
    raise AssertionError(f"{read(page)} is shown, not {text!r}")


def tell(page, server, text):
    load(page, page_of_own(server, text))
    run(page)
    wait_to_read(page, text)
    wait_for_end(page)


@pytest.fixture(params=[False, True], ids=["classic", "nodes 2.0"])
def page(request, open_page):  # noqa: F811
    page = open_page()
    page.evaluate(
        "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param
    )
    yield page
    page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_a_story_is_there_again_after_another_tab_and_after_a_reload(page, server):
    tell(page, server, "Leo the bear is on the beach.")
    command(page, "Comfy.NewBlankWorkflow")
    assert read(page) is None
    command(page, "Workspace.PreviousOpenedWorkflow")
    wait_to_read(page, "Leo the bear is on the beach.")
    assert not page.evaluate(f"window.app.graph.getNodeById({VIEW}).imgs?.length")  # nor a preview beside it
    page.wait_for_timeout(1500)  # the draft is saved
    page.reload()
    page.wait_for_function(
        "window.app?.extensionManager?.setting && window.app.graph?.nodes.length", timeout=120_000
    )
    wait_to_read(page, "Leo the bear is on the beach.")
    keep(page, "story_after_a_reload")


def test_a_run_opened_from_the_history_shows_its_own_story(page, server):
    tell(page, server, "The first story.")
    page.evaluate(f"window.app.graph.getNodeById({STORY}).widgets[0].value = 'The second story.'")
    run(page)
    wait_to_read(page, "The second story.")
    wait_for_end(page)
    page.evaluate(
        """async () => {
            const app = document.querySelector('#vue-app').__vue_app__;
            const queue = app.config.globalProperties.$pinia._s.get('queue');
            await queue.update();
            await queue.historyTasks[1].loadWorkflow(window.app);
        }"""
    )
    wait_to_read(page, "The first story.")
    page.wait_for_timeout(1500)  # and nothing that comes later puts another in its place
    wait_to_read(page, "The first story.")


@pytest.mark.parametrize("inside", [[VIEW], [STORY], [STORY, VIEW]], ids=["view", "story", "both"])
def test_a_story_grows_in_and_out_of_a_subgraph(page, server, inside):
    load(page, page_of_own(server, "Mia the fox."))
    page.wait_for_timeout(500)
    page.evaluate(
        "ids => window.app.canvas.selectItems(ids.map(id => window.app.graph.getNodeById(id)))", inside
    )
    command(page, "Comfy.Graph.ConvertToSubgraph")
    assert page.evaluate("window.app.graph.subgraphs.size") == 1
    page.evaluate(
        f"""{EVERY_NODE}.find(node => node.type === 'MiniGPT5Story')
            .onExecuted({{ minigpt5_pages: [{{ text: 'So far.', picture: null }}] }})"""
    )
    assert read(page) == ["So far."]
    run(page)
    wait_to_read(page, "Mia the fox.")
    command(page, "Comfy.NewBlankWorkflow")
    command(page, "Workspace.PreviousOpenedWorkflow")
    wait_to_read(page, "Mia the fox.")


def test_what_is_to_be_said_of_a_page_stands_on_it_and_on_the_node_until_the_next_run(page, request):
    load(page, read_workflow("Storybook quickstart"))
    set_widgets(page, "MiniGPT5Interleaver", scenes=2, steps=2, instructions="A dragon.\nIt snows.")
    seed = len(request.node.name)  # another one in each rendering, or the scenes would be kept
    set_widgets(page, "MiniGPT5Interleaver", seed=seed)
    run(page)
    page.wait_for_function("document.querySelectorAll('.minigpt5-note').length >= 2", timeout=240_000)
    wait_for_end(page)
    notes = "document.querySelectorAll('.minigpt5-page .minigpt5-note')"
    assert page.evaluate(f"[...{notes}].every(note => note.parentElement.ariaLabel.includes('1'))")
    notice = "window.app.graph.nodes.find(node => node.type === 'MiniGPT5Interleaver').widgets"
    said = f"{notice}.map(widget => String(widget.value)).filter(text => text.includes('dragon.'))"
    assert any("Page 1: The storybook cannot draw" in text for text in page.evaluate(said))
    keep(page, "what_cannot_be_drawn")
    set_widgets(page, "MiniGPT5Interleaver", instructions="It snows.\nA key.")
    run(page)
    page.wait_for_timeout(1000)
    wait_for_end(page)
    assert not page.evaluate(f"{notes}.length")
    assert not [text for text in page.evaluate(said) if "cannot draw" in text]


def test_a_long_story_does_not_make_its_node_grow(page):
    load(page, read_workflow("Storybook quickstart"))
    page.wait_for_timeout(500)
    view = "window.app.graph.nodes.find(node => node.type === 'MiniGPT5ViewStory')"
    before = page.evaluate(f"{view}.size[1]")
    page.evaluate(
        f"{view}.onExecuted({{ minigpt5_pages: Array(40).fill({{ text: 'It snows.', picture: null }}) }})"
    )
    page.wait_for_timeout(1000)
    assert page.evaluate(f"{view}.size[1]") == before
    assert page.evaluate(f"{view}.storyReader.element.clientHeight") < before


def test_a_low_window_keeps_the_close_button_and_the_bar_in_sight(page):
    load(page, read_workflow("Storybook quickstart"))
    page.wait_for_timeout(500)
    page.set_viewport_size({"width": 1200, "height": 420})
    reader = "window.app.graph.nodes.find(node => node.type === 'MiniGPT5ViewStory').storyReader"
    page.evaluate(f"{reader}.show([{{ text: 'It snows and the fox goes on. '.repeat(60), picture: null }}])")
    page.evaluate(f"{reader}.open(0)")
    page.locator(".minigpt5-spread").evaluate("spread => spread.scrollTo(0, 10_000)")
    for part in (".minigpt5-close", ".minigpt5-bar"):
        box = page.locator(part).bounding_box()
        assert 0 <= box["y"] and box["y"] + box["height"] <= 420
    page.locator(".minigpt5-close").click()
    assert not page.locator("dialog.minigpt5-reading").count()
