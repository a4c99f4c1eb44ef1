"""Texts and files as people have them: encodings, line ends, Windows' names, odd rows, archives, links, suffixes."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.inside import named_file
from minigpt5_core.story import load_story
from minigpt5_core.story.captioned import open_captioned, read_captioned
from minigpt5_core.texts import parse_json, read_json
from trainer.ab.build import read_system
from trainer.cli import main
from trainer.common.recipe import load_recipe
from trainer.data.formats import read
from trainer.data.records import Broken, Record
from trainer.data.rows import PICTURES
from trainer.stages.align import AlignRecipe
from trainer.worlds.world import read_world

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
MARKS = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}  # the others write theirs
ENDS = ("\n", "\r\n", "\r")
WORDS = ["a fox in the snów", "Café Zürich"]


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())


def said(path, layout):
    return [row.why if isinstance(row, Broken) else row.scenes[0].text for row in read(path, layout)]


def told(words, name):
    """A text with these words in it, as each format has it."""
    if name == "metadata.jsonl":
        return "".join(
            json.dumps({"file_name": "1.png", "text": w}, ensure_ascii=False) + "\n" for w in words
        )
    if name == "metadata.csv":
        return "file_name,text\n" + "".join(f'1.png,"{w}"\n' for w in words)
    if name == "told.jsonl":
        items = [{"items": [{"text": w}, {"picture": "1.png"}]} for w in words]
        return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    if name == "cc3m.tsv":
        return "caption\timage_path\n" + "".join(f"{w}\t1.png\n" for w in words)
    if name == "mmdialog.jsonl":
        turns = [{"conversation": [{"turn": [{"__TEXT__": w}]}]} for w in words]
        return "".join(json.dumps(turn, ensure_ascii=False) + "\n" for turn in turns)
    if name in ("captions.csv", "captions.tsv"):
        return "caption\n" + "".join(f"{w}\n" for w in words)
    if name == "captions.jsonl":
        return "".join(json.dumps({"caption": w}, ensure_ascii=False) + "\n" for w in words)
    return "".join(f"{w}\n" for w in words)


FILES = {
    "metadata.jsonl": "folder", "metadata.csv": "folder", "told.jsonl": "jsonl", "cc3m.tsv": "cc3m",
    "mmdialog.jsonl": "mmdialog", "captions.csv": "captions", "captions.tsv": "captions", "captions.jsonl": "captions",
    "captions.txt": "captions",
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", FILES)
def test_a_text_is_read_in_every_encoding_and_with_every_line_end(tmp_path, name, encoding, end):
    pictures(tmp_path, "1.png")
    text = MARKS.get(encoding, "") + told(WORDS, name).replace("\n", end)
    (tmp_path / name).write_bytes(text.encode(encoding))
    layout = FILES[name]
    assert said(tmp_path if layout == "folder" else tmp_path / name, layout) == WORDS


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_captions_beside_pictures_and_in_shards_too(tmp_path, encoding):
    pictures(tmp_path, "1.png")
    content = (MARKS.get(encoding, "") + WORDS[0] + "\r\n").encode(encoding)
    (tmp_path / "1.txt").write_bytes(content)
    shard(tmp_path / "in" / "a.tar", ("k.png", png()), ("k.txt", content))
    assert said(tmp_path, "folder") == said(tmp_path / "in", "webdataset") == [WORDS[0]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_other_text_that_people_edit(tmp_path, encoding):
    def write(name, text):
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
        return tmp_path / name

    assert load_recipe(AlignRecipe, write("a.toml", "steps = 3\n"), []).optim.steps == 3
    knights = Path("trainer/worlds/knights.toml").read_text(encoding="utf-8")
    assert read_world(write("w.toml", knights))
    story = '{"format_version": 1, "prompt": "é", "seed": 0, "scenes": []}\n'
    assert load_story(write("story.json", story)).prompt == "é"
    assert list(read_system(write("s.jsonl", '{"id": "é", "items": [{"text": "a"}]}\n'))) == ["é"]
    assert read_json(write("a.json", '{"é": 1}')) == {"é": 1}
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("a fox\r\nönly\r\n".encode(encoding)))
    for path in (write("c.txt", "a fox\nönly\n"), tmp_path / "c.txt.gz"):
        assert [story[0].caption for story in read_captioned(open_captioned(path))] == ["a fox", "önly"]


def test_a_file_behind_another_one_brings_its_mark_along(tmp_path):
    lines = "".join("\ufeff" + told([word], "captions.jsonl") for word in WORDS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert said(tmp_path / "a.jsonl", "captions") == WORDS


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_utf_8_is_said_row_by_row_and_never_trained_on(tmp_path, name):
    pictures(tmp_path, "1.png")
    (tmp_path / name).write_bytes(told(["a fox", "Café", "a\0b"], name).encode("latin-1"))
    if "json" in name:  # a half character, and a zero byte, can be written there
        text = told(["a fox", "Caf@", "a#b"], name).replace("@", "\\ud800").replace("#", "\\u0000")
        (tmp_path / name).write_text(text)
    layout = FILES[name]
    first, *broken = said(tmp_path if layout == "folder" else tmp_path / name, layout)
    assert first == "a fox" and len(broken) == 2
    assert all("which is no UTF-8 text; save the file as UTF-8" in why for why in broken)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them_in_every_country(tmp_path, delimiter):
    pictures(tmp_path, "1.png")
    rows = [["id", "file_name", "text"], ["1", "1.png", '"a fox, a bear; both"']]
    (tmp_path / "metadata.csv").write_text("\n".join(delimiter.join(row) for row in rows))
    (tmp_path / "a.csv").write_text("\n".join(delimiter.join(row) for row in rows))
    assert said(tmp_path, "folder") == said(tmp_path / "a.csv", "captions") == ["a fox, a bear; both"]


def test_a_cell_too_many_and_a_quotation_mark_never_closed_are_rows(tmp_path):
    pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,a, b\n1.png,c\n1.png,"' + "x" * 140_000)
    many, fine, endless = said(tmp_path, "folder")
    assert "it has 3 columns, expected 2" in many and fine == "c" and "field larger than" in endless


# rows of every shape

ODD = [None, True, 7, -1.5, "", " ", "a\0b", "\ud800", [], [[]], [None], {}, {"a": None}, "x" * 5000, 10**40]


def odd_files(folder):
    """(path, format) of data sets in which everything stands where it does not belong."""
    for number, odd in enumerate(ODD):
        base = folder / str(number)
        base.mkdir()
        pictures(base, "1.png")
        stories = {
            "none": odd, "one": [odd], "caption": [{"caption": odd, "image_id": "1", "sequence_index": 0}],
            "id": [{"caption": "a", "image_id": odd}],
            "index": [{"caption": "a", "image_id": "1", "sequence_index": index} for index in (odd, 1)],
        }  # fmt: skip
        for name, value in {
            "a_cleaned.json": stories,
            "a_image_mapping.json": {"1": "1.png", "2": odd},
        }.items():
            (base / name).write_text(json.dumps(value))
        yield base / "a_cleaned.json", "vist"
        lines = [
            odd,
            {"items": odd},
            {"items": [odd]},
            {"id": odd, "items": [{"text": "a"}, {"picture": "1.png"}]},
        ]
        keys = ("text", "picture", "caption", "speaker")
        lines += [{"items": [{"text": "a"}, {key: odd}]} for key in keys]
        lines += [{"items": [{"picture": "1.png", key: odd}]} for key in keys]
        lines += [
            {"conversation_id": odd, "conversation": [{"turn": [{"__TEXT__": "a"}]}]},
            {"conversation": odd},
        ]
        lines += [{"conversation": [turn]} for turn in (odd, {"turn": odd}, {"turn": [odd]})]
        lines += [{"conversation": [{"turn": [{key: odd}]}]} for key in ("__TEXT__", "__MEDIA__")]
        lines += [{"file_name": odd, "text": "a"}, {"file_name": "1.png", "text": odd}, {"caption": odd}]
        for name, layout in {"a.jsonl": "jsonl", "b.jsonl": "mmdialog", "c.jsonl": "captions"}.items():
            (base / name).write_text("\n".join(map(json.dumps, lines)))
            yield base / name, layout
        (base / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        yield base, "folder"
        shard(base / "a.tar", ("k.png", png()), ("k.json", json.dumps({"caption": odd}).encode()),
              ("l.png", png()), ("l.json", json.dumps(odd).encode()))  # fmt: skip
        yield base / "a.tar", "webdataset"


def test_a_row_of_any_shape_is_a_row_and_never_the_end(tmp_path):
    for path, layout in odd_files(tmp_path):
        rows = list(read(path, layout))
        assert rows and all(isinstance(row, (Record, Broken)) for row in rows)
        for row in rows:
            texts = [row.where, row.why] if isinstance(row, Broken) else [row.where, row.id]
            assert all(text.encode() is not None for text in texts)  # can be printed
            if isinstance(row, Record):
                assert all(scene.text.encode() is not None and "\0" not in scene.text for scene in row.scenes)


def test_a_story_whose_order_is_not_said_is_a_row(tmp_path):
    pictures(tmp_path, "1.png")
    (tmp_path / "a_image_mapping.json").write_text('{"1": "1.png"}')
    scene = {"caption": "a", "image_id": "1"}
    told = {
        "x": [scene | {"sequence_index": None}, scene | {"sequence_index": 1}],
        "y": [scene],
        "z": [scene, scene],
    }
    (tmp_path / "a_cleaned.json").write_text("\ufeff" + json.dumps(told), encoding="utf-8")
    odd, *whole = read(tmp_path / "a_cleaned.json", "vist")
    assert odd.why == "its sequence_index is None, expected a number"
    assert [len(row.scenes) for row in whole] == [1, 2]


@pytest.mark.parametrize("opens", ["[", '{"a": ', "[ {\n"])
def test_nesting_without_end_is_refused_before_the_parser_goes_down_it(tmp_path, opens):
    (tmp_path / "a_image_mapping.json").write_text("{}")
    (tmp_path / "a_cleaned.json").write_text('{"x": ' + opens * 100_000)
    with pytest.raises(BadInputError, match="lists in each other a hundred deep"):
        list(read(tmp_path / "a_cleaned.json", "vist"))


def test_a_number_of_thousands_of_digits_is_refused_before_the_parser_dies_of_it(tmp_path):
    """In a process of its own: ijson's C backend takes Python with it."""
    (tmp_path / "a_cleaned.json").write_text('{"x": []}')
    for text in ('{"1": %s}', '{"1": "1.png", "n": [%s]}'):
        (tmp_path / "a_image_mapping.json").write_text(text % ("7" * 4301))
        command = [
            sys.executable,
            "-m",
            "trainer",
            "data",
            "check",
            str(tmp_path / "a_cleaned.json"),
            "--format=vist",
        ]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (
            ran.returncode == 2 and "a_image_mapping.json holds a number of thousands of digits" in ran.stderr
        )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{", "", "\ud800", "nul", b"\xff\xfe"]
)
def test_json_is_whole_or_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


# archives


def shard(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def captions(path):
    return [(row.id if isinstance(row, Record) else row.where, text) for row, text in zip(
        read(path, "webdataset"), said(path, "webdataset"), strict=True)]  # fmt: skip


def test_dots_in_members_names(tmp_path):
    shard(tmp_path / "a.tar", ("a.v2.png", png()), ("a.v2.txt", b"one"), ("b.v1.png", png()), ("b.v1.txt", b"two"),
          ("b.v2.png", png()), ("b.v2.txt", b"three"))  # fmt: skip
    assert captions(tmp_path) == [("a.v2", "one"), ("b.v1", "two"), ("b.v2", "three")]
    shard(tmp_path / "a.tar", ("d/c.PNG", png()), ("d/c.depth.png", png()), ("d/c.meta.json", b"{}"),
          ("d/c.txt", b"four"), ("e.image.jpg", png()), ("e.json", b'{"caption": "five"}'))  # fmt: skip
    assert captions(tmp_path) == [("d/c", "four"), ("e.image", "five")]


def test_a_key_twice_is_two_samples(tmp_path):
    shard(tmp_path / "a.tar", *[("k.png", png()), ("k.txt", b"one"), ("k.png", png()), ("k.txt", b"two")])
    assert captions(tmp_path) == [("k", "one"), ("k", "two")]
    shard(tmp_path / "a.tar", ("k.png", png()), ("k.png", png()), ("k.txt", b"two"), ("l.txt", b"x"))
    assert captions(tmp_path) == [
        ("a.tar:k", "its caption k.txt is missing"), ("k", "two"),
        ("a.tar:l", f"it holds no picture ({', '.join(PICTURES)})"),
    ]  # fmt: skip


def test_an_empty_shard_and_one_that_breaks_off_stop_none_behind_them(tmp_path):
    (tmp_path / "a.tar").touch()
    shard(tmp_path / "b.tar", ("k.png", png()), ("k.txt", b"b"), ("l.png", png()), ("l.txt", b"l"))
    whole = bytearray((tmp_path / "b.tar").read_bytes())
    (tmp_path / "c.tar").write_bytes(whole[:2048])  # the end of a member: nothing but the end mark is missing
    whole[2048 + 150] ^= 255  # the third header's checksum
    (tmp_path / "d.tar").write_bytes(whole)
    (tmp_path / "e.tar").write_bytes((tmp_path / "b.tar").read_bytes() * 2)
    shard(tmp_path / "f.tar.gz", ("k.png", png()), ("k.txt", b"f"))
    (tmp_path / "g.tgz").write_bytes((tmp_path / "f.tar.gz").read_bytes()[:60])
    rows = captions(tmp_path)
    assert ("k", "b") in rows and ("k", "f") in rows
    broken = dict(rows)
    assert (
        "breaks off" in broken["a.tar"] and "no end mark" in broken["c.tar"] and "damaged" in broken["d.tar"]
    )
    assert "laid behind this one" in broken["e.tar"] and "g.tgz" in broken


def test_what_a_mac_lays_beside_everything_is_none_of_the_data(tmp_path):
    pictures(
        tmp_path,
        "1.png",
        "sub/2.png",
        "._1.png",
        ".ipynb_checkpoints/1.png",
        "__MACOSX/1.png",
        "@eaDir/1.png",
    )
    for name in ("1", "sub/2", "._1"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert said(tmp_path, "folder") == ["1", "sub/2"]
    shard(
        tmp_path / "in" / "a.tar",
        ("./._k.png", b"x"),
        ("./k.png", png()),
        ("./k.txt", b"a"),
        ("__MACOSX/k.png", b""),
    )
    (tmp_path / "in" / "._a.tar").write_bytes(b"x")
    assert said(tmp_path / "in", "webdataset") == ["a"]


# names


def test_linked_folders_are_read_once_and_never_in_circles(tmp_path):
    pictures(tmp_path / "elsewhere", "1.png")
    (tmp_path / "elsewhere" / "1.txt").write_text("linked")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        (data / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(data)
    (data / "itself").symlink_to("itself")
    rows = list(read(data, "folder"))
    assert [(row.id, row.scenes[0].text) for row in rows] == [("a/1.png", "linked")]


def test_more_suffixes_and_captions_as_trainers_write_them(tmp_path):
    names = ["1.jfif", "2.JPE", "3.tiff", "4.tif", "5.avif", "6.PNG", "7.jp2"]
    pictures(tmp_path, *names, "8.png")
    for name in names:
        (tmp_path / f"{name[0]}.caption").write_text(name)
    (tmp_path / "8.png.txt").write_text("8.png")
    (tmp_path / "9.HEIC").touch()
    assert said(tmp_path, "folder") == [*names, "8.png", ".heic is not read; save it as .jpg or .png"]
    shard(tmp_path / "in" / "a.tar", ("k.jfif", png()), ("k.caption", b"a"))
    assert said(tmp_path / "in", "webdataset") == ["a"]


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "notes.txt").touch()
    for layout in ("folder", "webdataset"):
        with pytest.raises(BadInputError, match="holds no (picture|shard)"):
            list(read(tmp_path, layout))


def test_names_that_windows_has_written(tmp_path):
    pictures(tmp_path, "pics/1.png")
    (tmp_path / "a.tsv").write_text("caption\timage_path\na\tpics\\1.png\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": [{"text": "a"}, {"picture": ".\\pics\\1.png"}]}))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "pics\\1.png", "text": "a"}))
    for path, layout in ((tmp_path / "a.tsv", "cc3m"), (tmp_path / "a.jsonl", "jsonl"), (tmp_path, "folder")):
        (row,) = read(path, layout)
        assert isinstance(row, Record) and row.pictures[0].open().size == (4, 4)
    pictures(tmp_path, "odd\\name.png")  # a name like any other where it is there
    assert named_file(tmp_path, "odd\\name.png") == tmp_path / "odd\\name.png"
    for name in ("pics\\..\\..\\1.png", "c:\\1.png", "\\\\server\\1.png"):
        with pytest.raises(BadInputError, match="leads out"):
            named_file(tmp_path, name)


@pytest.mark.skipif(os.name == "nt", reason="there file names are text")
def test_a_name_that_is_no_text_is_read_and_can_be_printed(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    pictures(tmp_path, f"{name}.png", f"{name}2.png")
    (tmp_path / f"{name}.txt").write_text("a")
    record, broken = read(tmp_path, "folder")
    assert record.pictures[0].open().size == (4, 4) and broken.where == "caf\\udce92.png"
    assert main(["data", "check", str(tmp_path), "--format", "folder"]) == 0
    assert "caf\\udce92.png" in capsys.readouterr().out


# values on the command line


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-01",
        "07:30:00",
        "2024-05-01T07:30:00Z",
        "2024",
        "1e3",
        "true",
        "inf",
        "[a]",
        "[1]",
        "0x1F",
    ],
)
def test_a_path_may_look_like_another_value(text):
    recipe = load_recipe(AlignRecipe, None, [f"data={text}", f"model.llm={text}", "steps=3"])
    assert (recipe.data.path, recipe.model.llm, recipe.optim.steps) == (text, text, 3)


def test_text_in_quotation_marks_is_that_text_and_other_types_stay_what_they_are():
    recipe = load_recipe(AlignRecipe, None, ['data="a b"', "llm='2024-05-01'", "batch=7", "mapper_lr=1"])
    assert (recipe.data.path, recipe.model.llm) == ("a b", "2024-05-01")
    with pytest.raises(BadInputError, match="steps is .* expected int"):
        load_recipe(AlignRecipe, None, ["steps=many"])
    with pytest.raises(BadInputError, match="steps is a date or a time"):
        load_recipe(AlignRecipe, None, ["steps=2024-05-01"])


def test_a_recipe_says_how_to_write_dates_and_windows_paths(tmp_path):
    (tmp_path / "a.toml").write_text("[data]\npath = 2024-05-01\n")
    with pytest.raises(
        BadInputError, match='path is a date or a time; write it in quotation marks: path = "2024-05-01"'
    ):
        load_recipe(AlignRecipe, tmp_path / "a.toml", [])
    for path in ("C:\\Users\\me", "C:\\data"):
        (tmp_path / "a.toml").write_text(f'[data]\npath = "{path}"\n')
        with pytest.raises(BadInputError, match="A path with backslashes stands in single quotation marks"):
            load_recipe(AlignRecipe, tmp_path / "a.toml", [])
