"""What is opened as a picture: pixels only, from the folder that was given, never a program and never an address."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.inside import named_file
from minigpt5_core.rasters import known_rasters, open_picture
from minigpt5_core.story import Scene, Story
from minigpt5_core.story.pages import read_pictures
from trainer.ab.build import build_study
from trainer.data.formats import read
from trainer.data.records import Broken, BrokenPicture, Picture, Record
from trainer.evaluation.gallery import Gallery

ROOT = Path(__file__).resolve().parents[2]
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(PWNED) (w) file closefile\nshowpage\n"
)


@pytest.fixture
def no_program(monkeypatch):
    def run(*given, **named):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
def test_postscript_is_no_picture_under_any_name(no_program, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(POSTSCRIPT)
    with pytest.raises(AssertionError, match="Ghostscript"), Image.open(file) as picture:
        picture.convert("RGB")  # what Pillow would do
    for picture in (Picture(name, file), Picture(name, content=POSTSCRIPT)):
        with pytest.raises(BrokenPicture, match="cannot be decoded: cannot identify"):
            picture.open()
    with pytest.raises(BadInputError, match="Cannot read the story's picture"):
        read_pictures(Story("a", 0, (Scene("b", name),)), tmp_path)
    line = json.dumps({"id": "s", "items": [{"picture": name}]})
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "b.jsonl").write_text(line)
    with pytest.raises(BadInputError, match="cannot be read as a picture"):
        build_study(tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "study")


def test_a_planted_postscript_in_an_evaluations_pictures_is_not_run(no_program, tmp_path):
    gallery = Gallery(tmp_path, "s")
    gallery.story(0).mkdir()
    gallery.picture(0, 0).write_bytes(POSTSCRIPT)
    notes = {"settings": "s", "tokens": [1], "seconds": [1.0], "texts": ["a"]}
    (gallery.story(0) / "drawn.json").write_text(json.dumps(notes))
    with pytest.raises(OSError, match="cannot identify"):
        gallery.load(0)


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA"]
)
def test_what_people_have_is_opened(tmp_path, kind):
    if kind not in known_rasters():
        pytest.skip(f"this Pillow has no {kind}")
    Image.new("RGB", (32, 16), "red").save(tmp_path / "picture", kind)
    with open_picture(tmp_path / "picture") as picture:
        assert picture.format == kind and picture.convert("RGB").size == (32, 16)


def test_two_pictures_in_one_jpeg_as_phones_write_them_are_opened(tmp_path):
    first, second = Image.new("RGB", (32, 16), "red"), Image.new("RGB", (8, 4), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    with open_picture(tmp_path / "a.jpg") as picture:
        assert picture.size == (32, 16)


def test_nothing_else_lets_pillow_guess():
    """Image.open without `formats` may start a program: rasters.py is the one place that calls it."""
    files = [path for room in ("minigpt5_core", "nodes", "trainer") for path in (ROOT / room).rglob("*.py")]
    calling = {path.name for path in files if re.search(r"\bImage\.open\(", path.read_text(encoding="utf-8"))}
    assert calling == {"rasters.py"}


# names that lead elsewhere


@pytest.fixture
def data(tmp_path):
    """A data set's folder with a picture, a link to a folder elsewhere, and a picture outside of it."""
    folder = tmp_path / "data"
    for place in (folder / "pics", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "a.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    return folder


INSIDE = ("pics/a.png", "./pics/a.png", "pics/../pics/a.png", "linked/a.png")
OUTSIDE = (
    "../out.png", "pics/../../out.png", "..\\out.png", "pics\\..\\..\\out.png", "{folder}/pics/a.png", "//x/y/a.png",
    "c:\\a.png", "C:/a.png", "\\\\server\\share\\a.png", "a\0.png", "..",
)  # fmt: skip
ADDRESSES = (
    "http://127.0.0.1:9/a.png",
    "file:///etc/passwd",
    "ftp://x/a.png",
    "data:image/png;base64,aGk=" + "A" * 300,
)


def rows_of(folder, names, layout):
    """The rows of a data set whose annotation file says that its pictures are called so."""
    if layout == "jsonl":
        lines = [json.dumps({"items": [{"text": "a"}, {"picture": name}]}) for name in names]
    elif layout == "cc3m":
        lines = ["caption\timage_path", *(f"a\t{name}" for name in names)]
    elif layout == "folder":
        lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    elif layout == "mmdialog":
        lines = [
            json.dumps({"conversation": [{"turn": [{"__TEXT__": "a"}, {"__MEDIA__": name}]}]})
            for name in names
        ]
    else:
        told = {name: [{"caption": "a", "image_id": name, "sequence_index": 0}] for name in names}
        (folder / "x_image_mapping.json").write_text(json.dumps({name: name for name in names}))
        lines = [json.dumps(told)]
    path = folder / {"vist": "x_cleaned.json", "folder": "metadata.jsonl"}.get(layout, "x.txt")
    path.write_text("\n".join(lines) + "\n")
    return list(read(folder if layout == "folder" else path, layout))


@pytest.mark.parametrize("layout", ["jsonl", "cc3m", "folder", "vist"])
def test_a_data_sets_pictures_lie_in_its_folder(data, layout):
    names = [name.format(folder=data) for name in OUTSIDE if layout != "cc3m" or "\0" not in name]
    for row in rows_of(data, names, layout):
        assert (
            isinstance(row, Broken)
            and "leads out of its folder; expected a file in or below data/" in row.why
        )
    for row in rows_of(data, ADDRESSES, layout):
        assert isinstance(row, Broken) and "is an address; expected the name of a file" in row.why
    for row in rows_of(data, INSIDE, layout):
        assert isinstance(row, Record) and row.pictures[0].open().size == (4, 4)


def test_a_dialogues_media_lie_in_its_folder_too(data):
    rows = rows_of(data, ["../out", str(data.parent / "out"), "http://x/a"], "mmdialog")
    assert all(isinstance(row, Broken) for row in rows)


def test_a_link_and_then_upwards_leads_nowhere_else(data):
    """The system would go up from where the link leads to: data/linked/../out.png is out.png beside the data set."""
    assert (data / "linked" / ".." / "out.png").is_file()
    (row,) = rows_of(data, ["linked/../out.png"], "jsonl")
    assert isinstance(row, Broken) and row.why == "picture linked/../out.png is missing"
    assert named_file(data, "linked/../pics/a.png") == data / "pics" / "a.png"


def test_a_name_that_is_too_long_to_be_one_is_a_broken_row(data):
    (row,) = rows_of(data, ["a" * 5000], "jsonl")
    assert isinstance(row, Broken) and "cannot be looked for" in row.why


@pytest.mark.parametrize("name", ["../out.png", "{folder}/out.png", "http://127.0.0.1:9/a.png", "linked.png"])
def test_a_storys_pictures_lie_beside_it(data, name):
    (data / "linked.png").symlink_to(data.parent / "out.png")
    with pytest.raises(BadInputError, match="beside story.json|leads out of the story's folder"):
        read_pictures(Story("a", 0, (Scene("b", name.format(folder=data.parent)),)), data)


def test_a_link_that_leads_to_itself_is_no_picture(tmp_path):
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(BadInputError, match="a.png"):
        read_pictures(Story("a", 0, (Scene("b", "a.png"),)), tmp_path)


def test_a_study_takes_no_picture_from_elsewhere(data):
    for name in ("../out.png", str(data.parent / "out.png"), "https://x/a.png"):
        line = json.dumps({"id": "s", "items": [{"picture": name}]})
        for system in "ab":
            (data / f"{system}.jsonl").write_text(line)
        with pytest.raises(BadInputError, match="line 1: picture .*(leads out of its folder|is an address)"):
            build_study(data / "a.jsonl", data / "b.jsonl", data.parent / "study")
    assert not os.path.lexists(data.parent / "study")
