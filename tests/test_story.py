import json
from pathlib import Path

import pytest

from minigpt5_core.errors import BadInputError
from minigpt5_core.story import Scene, Story, load_story

STORY = Story("Mia the fox wakes up.", 7, (Scene("Mia’s “snow”.", "scene_01.png"), Scene("She waits.")))
VALUES = {
    "format_version": 1,
    "prompt": "Mia the fox wakes up.",
    "seed": 7,
    "scenes": [
        {"text": "Mia’s “snow”.", "picture": "scene_01.png"},
        {"text": "She waits.", "picture": None},
    ],
}


def test_a_story_is_written_in_the_shape_of_the_design() -> None:
    assert json.loads(STORY.to_json()) == VALUES
    assert "Mia’s “snow”." in STORY.to_json()


def test_a_story_comes_back_equal() -> None:
    assert Story.from_json(STORY.to_json()) == STORY


def test_a_story_is_loaded_from_its_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "story.json"
    path.write_text(STORY.to_json(), encoding="utf-8")
    assert load_story(path) == load_story(tmp_path) == STORY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version 2; this program reads 1"),
        ({"author": "me"}, "unknown key 'author'"),
        ({"prompt": 3}, "prompt is 3; expected a text"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"seed": True}, "seed is True; expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"scenes": {}}, "scenes is {}; expected a list"),
        ({"scenes": ["text"]}, "scene 1 is 'text'; expected an object"),
        ({"scenes": [{"text": "a"}]}, "In scene 1: missing key 'picture'"),
        ({"scenes": [{"text": None, "picture": None}]}, "text is None; expected a text"),
        ({"scenes": [{"text": "a", "picture": "../a.png"}]}, "beside story.json"),
        ({"scenes": [{"text": "a", "picture": "C:a.png"}]}, "beside story.json"),
    ],
)
def test_a_story_that_is_not_as_written_is_refused_with_the_reason(change: dict, words: str) -> None:
    with pytest.raises(BadInputError, match="(?s).*") as caught:
        Story.from_json(json.dumps(VALUES | change))
    assert words in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, '{"prompt": "a"}'])
def test_a_broken_story_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "story.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInputError, match="story.json"):
        load_story(path)


def test_a_missing_or_binary_story_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Cannot read .*none.json: No such file"):
        load_story(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="not UTF-8"):
        load_story(tmp_path / "binary.json")


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_seed_of_64_bits_is_kept(seed: int) -> None:
    assert Story.from_json(Story("a", seed).to_json()).seed == seed
