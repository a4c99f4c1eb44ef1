import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from minigpt5_core.errors import BadInputError
from minigpt5_core.story import Scene, Story, load_story
from minigpt5_core.story.pages import (
    MARGIN,
    PAGE,
    check_target,
    draw_strip,
    drawable,
    read_pictures,
    render_html,
    render_markdown,
    wrap,
    write_story,
)

RED, BLUE = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
STORY = Story("Mia & <the> fox", 7, (Scene("Mia’s café."), Scene("<b>She</b> waits.\nLong.")))
FILES = ["scene_01.png", "story.html", "story.json", "story.md", "strip.png"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_story_is_a_folder_of_five_kinds_of_files(tmp_path: Path) -> None:
    written = write_story(tmp_path / "a" / "story", STORY, [RED, None])
    assert names(tmp_path / "a" / "story") == FILES
    assert [scene.picture for scene in written.scenes] == ["scene_01.png", None]
    assert load_story(tmp_path / "a" / "story") == written
    assert names(tmp_path / "a") == ["story"]


def test_the_same_story_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_story(tmp_path / name, STORY, [RED, BLUE])
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_earlier_story_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_story(tmp_path / "story", STORY, [RED, BLUE])
    write_story(tmp_path / "story", Story("New", 0, (Scene("One."),)), [BLUE])
    assert names(tmp_path / "story") == FILES
    assert load_story(tmp_path / "story").prompt == "New"
    assert Image.open(tmp_path / "story" / "scene_01.png").getpixel((0, 0)) == (0, 0, 255)


def test_an_earlier_story_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_story(tmp_path / "story", STORY, [RED, BLUE])

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minigpt5_core.story.pages.draw_strip", full_disk)
    with pytest.raises(BadInputError, match="No space left"):
        write_story(tmp_path / "story", Story("New", 0), [])
    assert load_story(tmp_path / "story") == before
    assert names(tmp_path) == ["story"]


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "story", tmp_path / "file" / "a" / "b"):
        with pytest.raises(BadInputError, match="file is not a folder"):
            check_target(folder)


@pytest.mark.parametrize("name", ["s" * 300, "s" * 254, "s" * 300 + "/story", "/".join(["s" * 200] * 30)])
def test_a_name_too_long_for_the_disk_is_refused_before_the_story_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="too long"):
        check_target(tmp_path / name)


def test_a_folder_behind_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(BadInputError, match="Cannot write the story"):
        check_target(tmp_path / "link" / "story")


def test_the_root_is_no_story() -> None:
    with pytest.raises(BadInputError, match="is no story"):
        check_target(Path("/"))


@pytest.mark.parametrize("content", [["letter.txt"], ["story.json", "letter.txt"], ["scene_01.png"]])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("mine")
    with pytest.raises(BadInputError, match="letter.txt|scene_01.png"):
        write_story(tmp_path, STORY, [None, None])
    assert names(tmp_path) == sorted(content)


def test_a_story_with_few_pictures_is_a_story_too(tmp_path: Path) -> None:
    story = Story("a", 0, (Scene("b"),) * 9)
    write_story(tmp_path / "story", story, [None] * 8 + [RED])
    check_target(tmp_path / "story")


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path: Path) -> None:
    check_target(tmp_path)
    check_target(tmp_path / "new" / "er")


def test_pictures_come_back_as_they_were_written(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story", STORY, [RED, None])
    picture, none = read_pictures(story, tmp_path / "story")
    assert picture is not None and picture.tobytes() == RED.tobytes()
    assert none is None


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n1234"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "scene_01.png").write_bytes(content)
    with pytest.raises(BadInputError, match="scene_01.png"):
        read_pictures(Story("a", 0, (Scene("b", "scene_01.png"),)), tmp_path)


def test_the_strip_shows_every_picture_above_its_text() -> None:
    strip = draw_strip(STORY, [RED, BLUE])
    assert strip.width == 2 * PAGE + 3 * MARGIN
    assert strip.getpixel((MARGIN + 5, MARGIN + 5)) == (255, 0, 0)
    assert strip.getpixel((2 * MARGIN + PAGE + 5, MARGIN + PAGE - 5)) == (0, 0, 255)
    for left in (MARGIN, 2 * MARGIN + PAGE):
        text = strip.crop((left, MARGIN + PAGE + MARGIN, left + PAGE, strip.height - MARGIN))
        assert min(channel[0] for channel in text.getextrema()) < 64  # ink


def test_seven_pages_take_two_rows_of_the_strip() -> None:
    story = Story("a", 0, (Scene("b"),) * 7)
    one_row, two_rows = draw_strip(Story("a", 0, (Scene("b"),) * 6), [RED] * 6), draw_strip(story, [RED] * 7)
    assert two_rows.width == one_row.width
    assert two_rows.height == 2 * one_row.height - MARGIN


def test_text_wraps_inside_the_page_without_losing_a_word() -> None:
    text = "Mia walks and walks and walks over the hills to the sea. " + "m" * 50
    font = ImageFont.load_default(22)
    lines = wrap(text, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_letters_the_font_lacks_are_taken_apart_and_dashes_shortened() -> None:
    assert drawable("“Mia’s” café — naïve…") == "“Mia’s” cafe - naive…"
    assert drawable("狐") == "狐"


def test_the_page_needs_nothing_from_outside_and_escapes_every_text() -> None:
    class Reader(HTMLParser):
        tags: list[str] = []
        sources: list[str] = []
        text = ""

        def handle_starttag(self, tag: str, attributes: list) -> None:
            self.tags.append(tag)
            self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]

        def handle_data(self, data: str) -> None:
            self.text += data

    page = render_html(STORY, [b"png", None])
    reader = Reader()
    reader.feed(page)
    assert not {"b", "the", "script", "link"} & set(reader.tags)
    assert reader.sources == ["data:image/png;base64,cG5n"]
    assert "Mia & <the> fox" in reader.text and "<b>She</b> waits." in reader.text
    assert "http" not in page


def test_story_json_holds_no_times_and_no_paths(tmp_path: Path) -> None:
    write_story(tmp_path / "story", STORY, [RED, None])
    assert json.loads((tmp_path / "story" / "story.json").read_text(encoding="utf-8")) == {
        "format_version": 1,
        "prompt": "Mia & <the> fox",
        "seed": 7,
        "scenes": [
            {"text": "Mia’s café.", "picture": "scene_01.png"},
            {"text": "<b>She</b> waits.\nLong.", "picture": None},
        ],
    }


def test_markdown_shows_what_was_told_and_no_markup_of_it(tmp_path: Path) -> None:
    story = Story(
        "A *bold* [fox]", 0, (Scene("1. <b>One</b>\n- two # three"), Scene("Plain.", "scene_02.png"))
    )
    assert render_markdown(story).split("\n\n") == [
        "# A \\*bold\\* \\[fox\\]",
        "1\\. \\<b\\>One\\</b\\>",
        "\\- two \\# three",
        "![Picture of scene 2](scene_02.png)",
        "Plain.\n",
    ]


def test_metadata_lies_in_the_scenes_pictures(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("workflow", "{}")
    write_story(tmp_path / "story", STORY, [RED, None], metadata=info)
    with Image.open(tmp_path / "story" / "scene_01.png") as picture:
        assert picture.text == {"workflow": "{}"}
