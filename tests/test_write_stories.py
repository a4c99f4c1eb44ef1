"""An LLM writes stories in a form that is checked line by line, and goes on where it was interrupted."""

import json
import os
import signal

import pytest

from minigpt5_core.errors import BadInputError, CancelledError
from minigpt5_core.llm import add_vokens
from minigpt5_core.story.prompts import NEXT
from tests.conftest import make_tiny_parts
from trainer.cli import main
from trainer.common.progress import TrainingError
from trainer.worlds import write
from trainer.worlds.form import Draft, LineTrouble, Subject, request_text
from trainer.worlds.write import Writer, WriteSettings, Written, read_written, write_with_llm

FOX = Subject("fox", "red balloon", "in a forest")


@pytest.fixture(scope="module")
def llm():
    """The tiny LLM, a token a byte, with room for the examples."""
    return add_vokens(*make_tiny_parts(context=8192), 8)


@pytest.fixture
def scripted(monkeypatch):
    """In place of what a tiny LLM says: lines in the form, of which some are too short; a few calls may be counted."""
    calls = []

    def line(self, text, seed):
        if self.stop(0):
            raise CancelledError
        calls.append(seed)
        return (
            "short"
            if seed % 3 == 0
            else f"a {self.draft(self.written.following).subject.who} does thing {seed}"
        )

    monkeypatch.setattr(Writer, "_line", line)
    return calls


def test_a_story_is_written_line_by_line():
    draft = Draft(FOX)
    assert str(draft) == "Scene 1:"
    draft.add(" Mia the fox wakes up.\n")
    assert str(draft) == "Scene 1: Mia the fox wakes up.\nPicture:"
    draft.add('"a red fox in a forest"')
    assert str(draft) == "Scene 1: Mia the fox wakes up.\nPicture: a red fox in a forest\nScene 2:"
    draft.add("She finds a balloon.")
    draft.add("a red fox with a red balloon")
    assert draft.scenes == [
        ("Mia the fox wakes up.", "a red fox in a forest"),
        ("She finds a balloon.", "a red fox with a red balloon"),
    ]


@pytest.mark.parametrize(
    ("said", "line", "why"),
    [
        ([], "The sun shines on all.", "does not name the fox"),
        (["Mia the fox wakes up."], "a wood in the morning", "does not name the fox"),
        ([], "A fox.", "has 6 characters, expected 12 to 240"),
        ([], "A foxfoxfoxfox", "expected 12 to 240"),
        ([], "fox " * 100, "expected 12 to 240"),
        ([], "The fox [name] wakes up.", "holds brackets or another label"),
        ([], "A fox sits. Picture: a fox", "holds brackets or another label"),
        ([], "Mia the fox wakes up <it does not end>", "holds brackets"),
        (["Mia the fox wakes up.", "a fox in a wood"], "Mia the fox wakes up.", "was said before"),
        (["Mia the fox wakes up.", "a fox in a wood", "She runs away."], "a fox in a wood", "was said before"),
        (["Mia the fox wakes up.", "a fox in a wood"], "He carries it home over the hills.", "was said before"),
    ],
)  # fmt: skip
def test_a_line_that_does_not_hold_the_form_is_said(said, line, why):
    draft = Draft(FOX)
    for one in said:
        draft.add(one)
    before = str(draft)
    with pytest.raises(LineTrouble, match=why):
        draft.add(line)
    assert str(draft) == before


def test_the_request_holds_examples_of_as_many_scenes(llm):
    text = request_text(llm, FOX, 2)
    assert text.count("\nScene 2: ") == 2 and "Scene 3" not in text
    assert "a picture book story of 2 scenes about a fox with a red balloon in a forest." in text
    assert text.endswith("<|im_start|>assistant\n")


def test_stories_are_written_as_requests_texts_and_captions(llm, scripted, tmp_path):
    out = tmp_path / "stories.jsonl"
    written = write_with_llm(llm, WriteSettings(stories=3, scenes=2), out)
    assert written.stories == 3 and written.lines == len(scripted) and written.redrawn > 0
    for line in out.read_text().splitlines():
        items = json.loads(line)["items"]
        assert [next(iter(item)) for item in items] == ["text", "text", "caption"] * 2
        assert items[0]["speaker"] == items[3]["speaker"] == "user" and "speaker" not in items[1]
        assert items[0]["text"].startswith("Tell me a story about a") and items[3]["text"] == NEXT


def test_a_run_goes_on_behind_what_is_there_and_ends_with_the_same_file(llm, scripted, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    write_with_llm(llm, WriteSettings(stories=6), whole)
    write_with_llm(llm, WriteSettings(stories=2), parts)
    with parts.open("a") as file:
        file.write('{"id": "000009", "ite')  # the machine went off
    assert write_with_llm(llm, WriteSettings(stories=6), parts).stories == 6
    assert parts.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.jsonl"
    write_with_llm(llm, WriteSettings(stories=6, seed=1), other)
    assert other.read_bytes() != whole.read_bytes()
    assert write_with_llm(llm, WriteSettings(stories=6), parts).tried == 0


def test_a_story_whose_line_never_holds_the_form_is_dropped_and_counted(llm, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "TRIES", 2)
    written = write_with_llm(llm, WriteSettings(stories=12), tmp_path / "stories.jsonl")
    ids = [int(json.loads(line)["id"]) for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    assert written.dropped == written.tried - 12 > 0 and ids == sorted(ids) and len(ids) == 12
    assert ids[-1] == written.following - 1 and written.redrawn >= 2 * written.dropped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_everything(llm, scripted, tmp_path, monkeypatch, number):
    out, line = tmp_path / "stories.jsonl", Writer._line

    def interrupted(self, text, seed):
        if len(scripted) == 30:
            os.kill(os.getpid(), number)
        return line(self, text, seed)

    monkeypatch.setattr(Writer, "_line", interrupted)
    with pytest.raises(BaseException) as caught:
        write_with_llm(llm, WriteSettings(stories=50), out)
    assert caught.type.__name__ == {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "Terminated"}[number]
    kept = read_written(out)
    assert kept.stories > 0 and out.read_bytes().endswith(b"]}\n")


def test_an_llm_that_does_not_hold_the_form_is_given_up(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "TRIED_FIRST", 2)
    monkeypatch.setattr(write, "TRIES", 1)
    with pytest.raises(
        TrainingError, match="of 2 stories that this LLM tried 0 hold the form; the last line"
    ):
        write_with_llm(llm, WriteSettings(), tmp_path / "stories.jsonl")
    assert (tmp_path / "stories.jsonl").read_bytes() == b""


def test_a_line_follows_from_its_story_and_seed_alone(llm):
    settings = WriteSettings()
    used, fresh = (Writer(llm, settings, Written(), lambda row: False) for _ in range(2))
    for number, begun in ((0, "Scene 1:"), (1, "Scene 1: The fox runs.\nPicture:")):
        used._forget_last()
        used._line(request_text(llm, used.draft(number).subject, 4) + begun, 5)
    text = request_text(llm, used.draft(2).subject, 4) + "Scene 1:"
    for writer in (used, fresh):
        writer._forget_last()
    assert used.common == fresh.common and len(used.common) > 1000
    assert used._line(text, 7) == fresh._line(text, 7)


def test_the_llm_is_stopped_at_a_token(llm):
    writer = Writer(llm, WriteSettings(), Written(), lambda row: True)
    with pytest.raises(CancelledError):
        writer.write(0)


@pytest.mark.parametrize(
    "content", ["notes of mine", '{"id": "fox", "items": []}\n', "[1]\n", '{"items": []}\n', "\n"]
)
def test_a_file_of_something_else_is_left_alone(content, tmp_path):
    (tmp_path / "own").write_text(content)
    with pytest.raises(BadInputError, match="was not written by `trainer write`"):
        read_written(tmp_path / "own")
    assert (tmp_path / "own").read_text() == content


@pytest.mark.parametrize(("name", "value"), [("stories", 0), ("scenes", 1), ("temperature", 0.0)])
def test_settings_that_cannot_be_are_said(name, value):
    with pytest.raises(BadInputError, match=f"{name} is {value:g}"):
        WriteSettings(**{name: value})


def test_the_command_names_what_is_no_llm(tmp_path, capsys):
    assert main(["write", "--llm", str(tmp_path), "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "is no Hugging Face model folder" in capsys.readouterr().err


def test_a_new_folder_is_made_and_what_is_no_folder_is_said(llm, scripted, tmp_path):
    out = tmp_path / "new" / "stories.jsonl"
    assert write_with_llm(llm, WriteSettings(stories=1, scenes=2), out).stories == 1
    with pytest.raises(BadInputError, match="cannot be (read|written)"):
        write_with_llm(llm, WriteSettings(stories=1), out / "below.jsonl")
