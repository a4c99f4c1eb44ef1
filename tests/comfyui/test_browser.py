"""The real frontend in a real browser: templates, the story reader, help pages, languages, themes."""

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.chromium import needs_chromium

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / ".screenshots"
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
EVIL = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'> once upon a time"

pytestmark = needs_chromium


@pytest.fixture
def open_page(browser, server):
    """Opens the frontend: open_page(blocked=()) gives a page whose app is ready; `blocked` files do not arrive."""
    contexts = []
    server.post(
        "/settings/Comfy.TutorialCompleted", True
    )  # a first visit would open the templates over the page

    def open_one(blocked=()):
        contexts.append(browser.new_context(viewport={"width": 1600, "height": 1000}))
        page = contexts[-1].new_page()
        for name in blocked:
            page.route(f"**/{name}", lambda route: route.abort())
        page.goto(f"http://{server.address}")
        page.wait_for_function("window.app?.extensionManager?.setting && window.app.graph", timeout=120_000)
        page.locator("button:has-text('Run')").first.wait_for(timeout=60_000)
        return page

    yield open_one
    for context in contexts:
        context.close()


def keep(page, name):
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def load(page, workflow):
    page.evaluate("graph => window.app.loadGraphData(graph)", workflow)


def read_workflow(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def open_template(page, name):
    page.locator(".templates-tab-button, button[aria-label*='Templates']").first.click()
    page.get_by_text(re.compile("minigpt5", re.IGNORECASE)).first.click(timeout=60_000)
    page.get_by_text(name, exact=True).first.click(timeout=60_000)
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'MiniGPT5Interleaver')")


def set_widgets(page, node_type, **values):
    page.evaluate(
        """([type, values]) => {
            for (const node of window.app.graph.nodes.filter(node => node.type === type))
                for (const widget of node.widgets)
                    if (widget.name in values) widget.value = values[widget.name];
        }""",
        [node_type, values],
    )


def run(page):
    page.get_by_role("button", name="Run", exact=True).first.click()


def wait_for_end(page):
    """Asked from here: in wait_for_function the promise of an async function counts as true at once."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        queue = page.evaluate("async () => (await fetch('/queue')).json()")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        page.wait_for_timeout(250)
    raise AssertionError("the queue did not end within 240 s")


def test_the_quickstart_from_template_to_reading_view(open_page):
    page = open_page()
    open_template(page, "Storybook quickstart")
    set_widgets(page, "MiniGPT5Interleaver", scenes=3, steps=8, seed=4)
    page.evaluate(
        """() => {
            const list = document.querySelector('.minigpt5-pages');
            window.grown = [];
            new MutationObserver(() => window.grown.push(list.querySelectorAll('article').length))
                .observe(list, { childList: true });
        }"""
    )
    run(page)
    page.wait_for_function("document.querySelectorAll('.minigpt5-picture').length >= 6", timeout=240_000)
    assert {1, 2, 3} <= set(page.evaluate("window.grown"))  # scene by scene
    page.wait_for_function(
        "[...document.querySelectorAll('.minigpt5-picture')].every(x => x.naturalWidth === 128)"
    )
    wait_for_end(page)
    page.evaluate("window.app.canvas.fitViewToSelectionAnimated?.()")
    keep(page, "quickstart")
    text = page.locator(".minigpt5-text").first.text_content()
    assert "fox" in text
    read_with_the_keyboard(page, text)


def read_with_the_keyboard(page, text):
    page.locator(".minigpt5-read").first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Story")
    assert dialog.locator(".minigpt5-text").text_content() == text
    keep(page, "reading_view")
    page.keyboard.press("ArrowRight")
    assert "Page 2 of 3" in dialog.text_content()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert "Page 3 of 3" in dialog.text_content()
    page.keyboard.press("Escape")
    assert not page.locator("dialog.minigpt5-reading").count()
    assert page.evaluate("document.activeElement.className") == "minigpt5-read"


def test_light_and_dark_follow_the_palette(open_page, server):
    page = open_page()
    load(page, page_of_own(server, "A light page."))
    run(page)
    page.locator(".minigpt5-picture").first.wait_for(timeout=60_000)
    assert not page.evaluate(
        "window.app.graph.getNodeById(3).imgs?.length"
    )  # ComfyUI's preview is not beside ours
    backgrounds = {}
    for palette in ("dark", "light"):
        page.evaluate("name => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
        page.wait_for_timeout(500)
        backgrounds[palette] = page.evaluate(
            "getComputedStyle(document.querySelector('.minigpt5-reader')).backgroundColor"
        )
        page.locator(".minigpt5-read").first.click()
        keep(page, f"reading_view_{palette}")
        page.keyboard.press("Escape")
    page.evaluate("window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert backgrounds["dark"] != backgrounds["light"]


def page_of_own(server, text):
    """A workflow of a page of one's own: no LLM in it."""
    Image.new("RGB", (64, 48), "teal").save(server.base / "input" / "own.png")
    link = {"name": "story", "type": "MINIGPT5_STORY"}
    common = {"flags": {}, "mode": 0, "order": 0, "properties": {}}
    return {
        "last_node_id": 3, "last_link_id": 2, "version": 0.4, "groups": [], "config": {}, "extra": {},
        "nodes": [
            common | {"id": 1, "type": "LoadImage", "pos": [0, 0], "size": [300, 300],
             "widgets_values": ["own.png", "image"],
             "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}, {"name": "MASK", "type": "MASK"}]},
            common | {"id": 2, "type": "MiniGPT5Story", "pos": [350, 0], "size": [300, 200], "widgets_values": [text],
             "inputs": [{"name": "image", "type": "IMAGE", "link": 1},
                        {"name": "earlier", "type": "MINIGPT5_STORY", "link": None}],
             "outputs": [link | {"links": [2]}]},
            common | {"id": 3, "type": "MiniGPT5ViewStory", "pos": [700, 0], "size": [360, 480],
             "inputs": [link | {"link": 2}], "outputs": [link]},
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "MINIGPT5_STORY"]],
    }  # fmt: skip


def test_markup_in_a_story_is_shown_as_text(open_page, server):
    page = open_page()
    load(page, page_of_own(server, EVIL))
    run(page)
    shown = page.locator(".minigpt5-text").first
    shown.wait_for(timeout=60_000)
    assert shown.text_content() == EVIL
    page.locator(".minigpt5-read").first.click()
    assert page.locator("dialog .minigpt5-text").text_content() == EVIL
    page.wait_for_timeout(300)
    assert page.evaluate("window.broken") is None


def test_without_our_javascript_comfyui_shows_text_and_pictures(open_page, server):
    page = open_page(blocked=["story_reader.js"])
    load(page, page_of_own(server, "Leo the bear is on the beach."))
    run(page)
    page.wait_for_function("window.app.graph.getNodeById(3).imgs?.length === 1", timeout=60_000)
    widgets = page.evaluate("window.app.graph.getNodeById(3).widgets.map(widget => String(widget.value))")
    assert any("Leo the bear is on the beach." in value for value in widgets)
    assert not page.locator(".minigpt5-reader").count()
    keep(page, "without_javascript")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_loads_whole(open_page, name):
    page = open_page()
    workflow = read_workflow(name)
    load(page, workflow)
    page.wait_for_timeout(500)
    loaded = page.evaluate("window.app.graph.serialize()")
    assert not page.get_by_text(re.compile("missing node", re.IGNORECASE)).count()
    assert {node["type"] for node in loaded["nodes"]} == {node["type"] for node in workflow["nodes"]}
    assert sorted(map(str, loaded["links"])) == sorted(map(str, workflow["links"]))
    assert widget_values(loaded) == widget_values(workflow)
    keep(page, f"workflow_{name.replace(' ', '_')}")


def widget_values(workflow):
    """By node; what a Preview Any has shown is no input, and newer frontends keep it among them."""
    nodes = [node for node in workflow["nodes"] if node["type"] != "PreviewAny"]
    return {node["id"]: node["widgets_values"] for node in nodes if node.get("widgets_values")}


def test_a_node_has_a_help_page(open_page):
    page = open_page()
    load(page, read_workflow("Storybook quickstart"))
    page.evaluate(
        """() => {
            const canvas = window.app.canvas;
            canvas.selectNode(window.app.graph.nodes.find(node => node.type === 'MiniGPT5Interleaver'));
            canvas.fitViewToSelectionAnimated?.();
        }"""
    )
    page.wait_for_timeout(800)
    page.get_by_test_id("info-button").click()
    page.get_by_text("Good to know").first.wait_for(timeout=20_000)
    keep(page, "help_page")


def test_chinese_names_where_the_frontend_is_chinese(open_page):
    page = open_page()
    page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        page.reload()
        page.wait_for_function("window.app?.extensionManager?.setting && window.app.graph", timeout=120_000)
        page.wait_for_timeout(2000)
        load(page, read_workflow("Storybook quickstart"))
        title = page.evaluate("window.app.graph.nodes.find(node => node.type === 'MiniGPT5ViewStory').title")
        assert re.search("[一-鿿]", title)
        assert page.get_by_text("运行工作流后").first.is_visible()
    finally:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'en')")
