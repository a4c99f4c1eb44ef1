"""The page in a real browser."""

import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest

from minigpt5_core.errors import BadInputError
from tests.ab.studies import EVIL, SECRETS, RealServer, write_system
from tests.chromium import needs_chromium
from trainer.ab.answers import read_answers
from trainer.ab.build import build_study
from trainer.ab.cli import run
from trainer.ab.study import QUESTIONS, load_study

SHOTS = os.environ.get("AB_SHOTS")  # a folder to keep screenshots in


def in_browser(test):
    return pytest.mark.slow(needs_chromium(test))


@pytest.fixture
def open_page(browser):
    """open_page(url, ...) gives a page of a rater with a browser of the own, and fails on errors in it."""
    contexts, errors = [], []

    def open_one(url, **settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and errors.append(message.text))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def real_server():
    """real_server(folder, port) starts one; all are ended."""
    running = []

    def start(folder, port=0):
        running.append(RealServer(folder, port))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def keep(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(exist_ok=True)
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def log_in(page, name):
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.get_by_role("heading", name="Pair 1 of").wait_for()


def at(page, text):
    page.get_by_role("heading", name=text).wait_for()


def click_answers(page, *choices):
    for (title, _), choice in zip(QUESTIONS.values(), choices, strict=True):
        page.get_by_role("button", name=f"{title}: {choice}").click()


def pressed(page):
    return [button.get_attribute("aria-label") for button in page.locator("button[aria-pressed=true]").all()]


def kept(folder, rater):
    return {(each.pair, each.question): each.answer for each in read_answers(folder) if each.rater == rater}


@in_browser
def test_two_raters_by_mouse_and_by_keys_and_a_server_that_is_killed(folder, open_page, real_server):
    server = real_server(folder)
    orders = {name: [pair.name for pair in load_study(folder).order_for(name)] for name in ("Mo", "Kay")}
    mouse, keys = open_page(server.url), open_page(server.url)
    log_in(mouse, "Mo")
    log_in(keys, "Kay")
    for number in range(1, 4):
        at(mouse, f"Pair {number} of 6")
        click_answers(mouse, "Left", "Tie", "Right")
        at(keys, f"Pair {number} of 6")
        for key in "321":
            keys.keyboard.press(key)
    at(mouse, "Pair 4 of 6")
    at(keys, "Pair 4 of 6")
    keys.keyboard.press("2")
    mouse.get_by_role("button", name="Language continuity: Right").click()
    keys.get_by_text("Saved.", exact=True).wait_for()
    mouse.get_by_text("Saved.", exact=True).wait_for()
    keep(mouse, "desktop")
    assert server.end(signal.SIGKILL) == -signal.SIGKILL

    mouse.get_by_role("button", name="Image quality: Left").click()
    mouse.get_by_role("button", name="Multimodal coherence: Left").click()
    mouse.get_by_role("alert").get_by_text("Not saved yet").wait_for()
    at(mouse, "Pair 4 of 6")  # and waits there
    keep(mouse, "not_saved")
    server = real_server(folder, server.port)
    at(mouse, "Pair 5 of 6")  # by itself, with everything saved
    mouse.get_by_role("alert").wait_for(state="hidden")
    keys.reload()
    at(keys, "Pair 4 of 6")
    assert pressed(keys) == ["Language continuity: Tie"]
    keys.keyboard.press("3")
    keys.keyboard.press("3")

    again = open_page(f"{server.url}/?rater=Mo")  # another day, another browser
    at(again, "Pair 5 of 6")
    assert "4 of 6 answered" in again.locator("header").inner_text()
    for number in (5, 6):
        at(again, f"Pair {number} of 6")
        click_answers(again, "Left", "Left", "Left")
        at(keys, f"Pair {number} of 6")
        for key in "111":
            keys.keyboard.press(key)
    for page, name in ((again, "Mo"), (keys, "Kay")):
        at(page, "Thank you")
        assert "6 of 6 answered" in page.locator("header").inner_text()
        assert len(kept(folder, name)) == 18
    keep(again, "done")
    mo, kay = kept(folder, "Mo"), kept(folder, "Kay")
    assert [mo[orders["Mo"][0], key] for key in QUESTIONS] == ["left", "tie", "right"]
    assert [mo[orders["Mo"][3], key] for key in QUESTIONS] == ["right", "left", "left"]
    assert [kay[orders["Kay"][2], key] for key in QUESTIONS] == ["right", "tie", "left"]
    assert [kay[orders["Kay"][3], key] for key in QUESTIONS] == ["tie", "right", "right"]
    assert run(["report", str(folder)]) == 0
    report = json.loads((folder / "ab_report.json").read_text())
    assert list(report["questions"]) == list(QUESTIONS)
    assert {(each["answers"], each["raters"]) for each in report["questions"].values()} == {(12, 2)}
    page = open_page((folder / "ab_report.html").as_uri())
    keep(page, "report")


@in_browser
def test_a_rater_goes_back_and_changes_an_answer(folder, open_page, real_server):
    server = real_server(folder)
    page = open_page(server.url)
    log_in(page, "Ann")
    for key in "123":
        page.keyboard.press(key)
    at(page, "Pair 2 of 6")
    page.keyboard.press("Backspace")
    at(page, "Pair 1 of 6")
    assert pressed(page) == ["Language continuity: Left", "Image quality: Tie", "Multimodal coherence: Right"]
    assert page.locator("[aria-current=step] h3").inner_text() == "Multimodal coherence"
    page.keyboard.press("Backspace")
    page.keyboard.press("3")  # image quality, and on to the next question
    page.keyboard.press("2")
    at(page, "Pair 2 of 6")
    first = load_study(folder).order_for("Ann")[0].name
    assert kept(folder, "Ann") == {
        (first, "language"): "left",
        (first, "image"): "right",
        (first, "coherence"): "tie",
    }
    page.get_by_role("button", name="Next pair").click()
    at(page, "Pair 3 of 6")
    page.get_by_role("button", name="Previous pair").click()
    at(page, "Pair 2 of 6")
    page.get_by_role("button", name="Image quality: Right").dblclick()
    page.get_by_role("button", name="Change name").click()
    log_in(page, "Bob")
    assert pressed(page) == [] and "0 of 6 answered" in page.locator("header").inner_text()


@in_browser
def test_pairs_that_were_passed_over_come_back_at_the_end(folder, open_page, real_server):
    page = open_page(f"{real_server(folder).url}/?rater=Ann")
    at(page, "Pair 1 of 6")
    page.get_by_role("button", name="Next pair").click()
    for number in range(2, 7):
        at(page, f"Pair {number} of 6")
        for key in "222":
            page.keyboard.press(key)
    at(page, "Pair 1 of 6")
    for key in "222":
        page.keyboard.press(key)
    at(page, "Thank you")


@in_browser
def test_another_study_at_the_same_address_gets_none_of_this_ones_answers(
    tmp_path, systems, folder, open_page, real_server
):
    server = real_server(folder)
    page = open_page(f"{server.url}/?rater=Ann")
    at(page, "Pair 1 of 6")
    server.end(signal.SIGKILL)
    build_study(*systems, tmp_path / "other", seed=1)
    real_server(tmp_path / "other", server.port)
    page.keyboard.press("1")
    page.get_by_role("alert").get_by_text("Another study").wait_for()
    with pytest.raises(BadInputError, match="no answers"):
        read_answers(tmp_path / "other")


@in_browser
def test_texts_are_shown_as_they_are_and_run_nothing(tmp_path, open_page, real_server):
    a = write_system(tmp_path / "in", SECRETS[0], texts=EVIL)
    b = write_system(tmp_path / "in", SECRETS[1])
    build_study(a, b, tmp_path / "study")
    page = open_page(f"{real_server(tmp_path / 'study').url}/?rater={urllib.request.quote(EVIL[:70])}")
    at(page, "Pair 1 of 6")
    assert EVIL in page.locator(".stories").inner_text()
    assert EVIL[:70] in page.locator("header").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator(".stories img").count() == 4 and page.locator("main script").count() == 0


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_used_by_tab_and_enter(folder, open_page, real_server, scheme):
    server = real_server(folder)
    page = open_page(server.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    keep(page, f"welcome_{scheme}")
    log_in(page, "Ann")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_by_role("group").count() == 3 and page.get_by_role("progressbar").count() == 1
    assert page.get_by_role("img", name="Picture 2 of the left story").count() == 1
    keep(page, f"phone_{scheme}")
    page.get_by_role("button", name="Language continuity: Left").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert pressed(page) == ["Language continuity: Tie"]
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"
    page.evaluate("scrollTo(0, 1e6)")
    keep(page, f"phone_questions_{scheme}")
