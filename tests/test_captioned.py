"""Captions and stories with a caption a scene: as lines, in the storybook's own file, and through the LLM."""

import gzip
import json
from itertools import islice

import pytest
import torch

from minigpt5_core.errors import BadInputError
from minigpt5_core.story.captioned import (
    CAPTIONED,
    CaptionedScene,
    as_lines,
    open_captioned,
    read_captioned,
)
from minigpt5_core.story.prompts import NEXT, Turn
from minigpt5_core.story.states import READ_AT_ONCE, read_voken_states, turns_of
from minigpt5_core.story.storybook import STORYBOOK
from trainer.llm.sequences import story_losses, story_sequence
from trainer.storybook.world.captioned import captioned_stories, write_captioned
from trainer.storybook.world.state import State, held_out

TEXTS = """a fox in the snow by day

Mia the fox wakes up. | a fox in the snow by day
Go on. | She runs. | a fox on the beach by day
She rests. |

  a bear at night
"""
FOX, BEAR = "a fox in the snow by day", "a bear at night"
STORY = (
    CaptionedScene("", "Mia the fox wakes up.", FOX),
    CaptionedScene("Go on.", "She runs.", "a fox on the beach by day"),
    CaptionedScene("", "She rests.", ""),
)
ALONE = [(CaptionedScene(caption, "", caption),) for caption in (FOX, BEAR)]


def test_lines_are_captions_and_stories():
    assert list(read_captioned(TEXTS.splitlines())) == [ALONE[0], STORY, ALONE[1]]


def test_a_story_that_is_written_is_read_again():
    stories = [ALONE[0], STORY[:2], STORY[:1], ALONE[1]]
    assert list(read_captioned([line for story in stories for line in as_lines(story)])) == stories


def test_a_line_of_the_data_format_is_a_story():
    items = [
        {"text": "Begin.", "speaker": "user"},
        {"text": "Mia the fox wakes up."},
        {"picture": "1.png", "caption": FOX},
        {"text": "She runs."},
        {"text": "She rests."},
        {"caption": BEAR},
    ]
    (story,) = read_captioned([json.dumps({"id": "one", "items": items})])
    assert story == (
        CaptionedScene("Begin.", "Mia the fox wakes up.", FOX),
        CaptionedScene("", "She runs.", ""),
        CaptionedScene("", "She rests.", BEAR),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a | b | c | d", "Line 2 of the texts is 'a | b | c | d'. Expected: text | caption"),
        ("|", "Line 2 of the texts"),
        ('{"items": 3}', "Line 2 of the texts begins with a brace, but is no story"),
        ("{broken", "begins with a brace"),
    ],
)
def test_a_line_that_is_neither_is_refused_by_its_number(line, said):
    with pytest.raises(BadInputError) as caught:
        list(read_captioned(["a fox", line]))
    assert said in str(caught.value)


def test_only_what_is_asked_for_is_read():
    endless = iter(lambda: "a fox", None)
    assert len(list(islice(read_captioned(endless), 5))) == 5


@pytest.mark.parametrize("name", ["texts.txt", "texts.txt.gz"])
def test_a_file_is_read_plain_or_compressed(tmp_path, name):
    content = TEXTS.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [line.rstrip("\n") for line in open_captioned(tmp_path / name)] == TEXTS.splitlines()


def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path):
    (tmp_path / "texts.gz").write_bytes(gzip.compress(TEXTS.encode())[:40])
    with pytest.raises(BadInputError, match="texts.gz cannot be read"):
        list(open_captioned(tmp_path / "texts.gz"))


# The storybook's


def test_the_storybooks_file_holds_what_its_mapper_learned_from(tmp_path):
    shipped = STORYBOOK / CAPTIONED
    assert shipped.stat().st_size < 300_000
    found = list(read_captioned(open_captioned(shipped)))
    assert found == list(captioned_stories())
    assert sum(len(story) > 1 for story in found) == 1400


def test_nothing_of_it_is_held_out():
    captions = {scene.caption for story in captioned_stories() for scene in story}
    hidden = State("fox", "snow", "day")
    combinations = [
        hidden.but(hero=hero, prop=prop, place=place)
        for hero in ("fox", "bear", "lion", "unicorn")
        for prop in ("balloon", "key", "cake")
        for place in ("snow", "beach", "village")
    ]
    kept_back = [state.caption() for state in combinations if held_out(state)]
    assert kept_back and not captions & set(kept_back)


def test_any_first_part_is_a_sample_of_all(tmp_path):
    part = list(islice(captioned_stories(), 240))
    assert 90 <= sum(len(story) == 1 for story in part) <= 110


def test_the_same_bytes_every_time(tmp_path):
    for name in "ab":
        write_captioned(tmp_path / name, 5, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Through the LLM


def test_a_story_becomes_the_turns_that_the_llm_would_tell():
    assert turns_of(STORY) == [
        Turn("Mia the fox wakes up.", "Mia the fox wakes up."),
        Turn("Go on.", "She runs."),
        Turn(NEXT, "She rests.", picture=False),
    ]
    assert turns_of(ALONE[0]) == [Turn(FOX, "")]


def test_the_states_are_those_of_the_trainer(tiny_llm):
    stories = [ALONE[0], STORY, ALONE[1], STORY[1:2]]
    found = dict(read_voken_states(tiny_llm, stories))
    assert [len(found[index]) for index in range(4)] == [1, 2, 1, 1]
    for index, story in enumerate(stories):
        expected, _ = story_losses(tiny_llm, [story_sequence(tiny_llm, turns_of(story))])
        assert torch.allclose(found[index], expected, atol=1e-4)


def test_of_a_story_longer_than_the_context_the_first_scenes_are_read(tiny_llm):
    long = STORY[:1] * 40
    whole = dict(read_voken_states(tiny_llm, [long[:2]]))[0]
    found = dict(read_voken_states(tiny_llm, [long, (CaptionedScene("", "x" * 9000, FOX),)]))
    assert 0 < len(found[0]) < 40
    assert torch.allclose(found[0][:2], whole, atol=1e-4)
    assert len(found[1]) == 0


def test_no_forward_is_larger_than_it_may_be_unless_one_story_is(tiny_llm, monkeypatch):
    sizes = []
    read = type(tiny_llm).read

    def listen(self, inputs, **arguments):
        sizes.append(inputs.shape[0] * inputs.shape[1])
        return read(self, inputs, **arguments)

    monkeypatch.setattr(type(tiny_llm), "read", listen)
    assert len(list(read_voken_states(tiny_llm, [ALONE[0], STORY] * 10))) == 20
    assert 1 < len(sizes) and max(sizes) <= READ_AT_ONCE
