"""Pictures as people have them: what is read is what a viewer shows, in data sets, stories, studies and nodes."""

import io
import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.rasters import UNREADABLE, as_seen, open_picture
from minigpt5_core.story import Scene, Story
from minigpt5_core.story.pages import TALLEST, draw_strip, read_pictures, write_story
from minigpt5_core.vision.pictures import picture_tensor
from trainer.ab.build import build_study
from trainer.data.formats import read
from trainer.data.records import BrokenPicture, Picture

ORIENTATION = 0x0112
GREYS = np.arange(0, 65536, 257, dtype=np.uint16).reshape(
    16, 16
)  # 0 to 255, each as it is written in 16 bits


def encoded(picture, kind, **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def decoded(content):
    """As a training gets it."""
    return Picture("it", content=content).open()


def sideways(kind="JPEG", orientation=6):
    """40 x 20 as it lies in the file, its left half red; a viewer turns it: 20 x 40, the upper half red."""
    picture, exif = Image.new("RGB", (40, 20), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 20, 20))
    exif[ORIENTATION] = orientation
    return encoded(picture, kind, exif=exif)


def colour(picture, place):
    return tuple(round(value / 64) for value in picture.getpixel(place))  # JPEG is not exact


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_held_sideways_is_upright(kind):
    seen = decoded(sideways(kind))
    assert seen.size == (20, 40) and seen.mode == "RGB"
    assert (colour(seen, (10, 5)), colour(seen, (10, 35))) == ((4, 0, 0), (0, 0, 4))


def test_a_picture_is_upright_wherever_it_is_read(tmp_path, pack):
    (tmp_path / "a.jpg").write_bytes(sideways())
    (tmp_path / "a.txt").write_text("a flag")
    (record,) = read(tmp_path, "folder")
    (told,) = read_pictures(Story("a", 0, (Scene("b", "a.jpg"),)), tmp_path)
    with Image.open(tmp_path / "a.jpg") as given:
        assert picture_tensor(given).shape == (40, 20, 3)
        write_story(tmp_path / "story", Story("a", 0, (Scene("b"),)), [given])
    written = Image.open(tmp_path / "story" / "scene_01.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "s", "items": [{"picture": "a.jpg"}]}))
    build_study(tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "study")
    rated = Image.open(tmp_path / "study" / "pictures" / "0001_left_1.png")
    assert [picture.size for picture in (record.pictures[0].open(), told, written, rated)] == [(20, 40)] * 4


def test_white_stands_behind_what_is_transparent():
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    for content, expected in (
        (encoded(clear, "PNG"), [(255, 255, 255), (255, 127, 127)]),
        (encoded(clear.convert("LA"), "PNG"), [(255, 255, 255), (165, 165, 165)]),
        (encoded(palette, "PNG", transparency=0), [(255, 255, 255)]),
        (encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG", transparency=(9, 9, 9)), [(255, 255, 255)]),
    ):
        assert list(decoded(content).get_flattened_data()) == expected


def test_deep_greys_are_neither_clipped_nor_shifted():
    fractions = Image.fromarray((GREYS / 65535).astype(np.float32))
    whole = Image.fromarray(GREYS.astype(np.int32))
    for content in (
        encoded(Image.fromarray(GREYS), "PNG"),
        encoded(Image.fromarray(GREYS), "TIFF"),
        encoded(whole, "TIFF"),
        encoded(fractions, "TIFF"),
    ):
        assert np.array_equal(np.asarray(decoded(content))[..., 0].ravel(), np.arange(256))
    for values in (
        np.float32([[0, 300]]),
        np.int32([[-1, 5]]),
        np.int32([[0, 70000]]),
        np.float32([[np.nan]]),
    ):
        with pytest.raises(
            BrokenPicture, match=r"grey values reach from .* expected 0 to .*save it with 8 bits"
        ):
            decoded(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "PA"])
def test_every_mode_is_seen_in_rgb(mode):
    seen = as_seen(Image.new(mode, (3, 2)))
    assert (seen.mode, seen.size) == ("RGB", (3, 2))


def test_lab_and_print_colours_are_those_that_are_seen():
    grey = as_seen(Image.new("LAB", (1, 1), (137, 128, 128))).getpixel((0, 0))  # L* 54: half grey
    assert all(abs(value - 128) <= 2 for value in grey)
    assert decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[0] > 250


@pytest.mark.filterwarnings("ignore")  # Pillow says what it finds damaged
def test_damaged_exif_does_no_harm_and_damaged_pictures_are_one_kind_of_error():
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk", b"Exif\0\0" + bytes(90)):
        assert decoded(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (40, 20)
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"):
        whole = np.frombuffer(encoded(Image.effect_noise((24, 24), 90).convert("RGB"), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            places = random.integers(0, min(len(whole), 200), 6)
            damaged[places] = random.integers(0, 256, 6)
            try:
                decoded(damaged.tobytes())
            except BrokenPicture:
                pass


def test_an_error_of_pillows_plugins_is_one_that_is_caught(tmp_path, monkeypatch):
    def stumble(*given):
        raise struct.error("unpack requires 4 bytes")

    monkeypatch.setattr(Image.Image, "convert", stumble)
    with pytest.raises(UNREADABLE, match="it is damaged"):
        as_seen(Image.new("L", (1, 1)))


def test_a_pipe_is_no_picture_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="it is no file"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(BadInputError, match="it is no file"):
        read_pictures(Story("a", 0, (Scene("b", "a.png"),)), tmp_path)


def test_a_strip_has_room_for_the_tallest_and_the_widest_picture():
    story = Story("a", 0, (Scene("b"), Scene("c")))
    strip = draw_strip(story, [Image.new("L", (1, 30_000)), Image.new("L", (30_000, 1))])
    assert strip.height < 2 * TALLEST


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_nodes_image_has_white_behind_its_alpha(pack, channels):
    image = torch.zeros(1, 2, 2, channels)
    (story,) = pack.run("MiniGPT5Story", image=image).args
    expected = 1.0 if channels in (2, 4) else 0.0
    assert torch.equal(story.pages[0].picture, torch.full((2, 2, 3), expected))
