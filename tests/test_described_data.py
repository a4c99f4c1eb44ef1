"""Data without pictures: captions in files of every kind, and stories whose pictures are described."""

import json
import random
import resource

import jsonschema
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from minigpt5_core.errors import BadInputError
from trainer.cli import main
from trainer.data import captions
from trainer.data.check import check
from trainer.data.formats import holds_pictures, read
from trainer.data.record_source import RecordSource
from trainer.data.records import Broken, Record, Scene
from trainer.data.stream import Stream
from trainer.data.tasks import TASKS, Task, Tools
from trainer.storybook.world.export import export_stories

WORDS = ["a fox, on the beach", 'a "red" bear']


def write(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def texts(path):
    return [row.why if isinstance(row, Broken) else row.scenes[0].text for row in read(path, "captions")]


# captions


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", 'a fox, on the beach\n\n  a "red" bear  \n'),
        ("a.csv", 'id,text\n1,"a fox, on the beach"\n2,"a ""red"" bear"\n'),
        ("a.csv", '\ufeffPrompt ,id\n"a fox, on the beach",1\n\na "red" bear,2\n'),
        ("a.tsv", 'n\tcaption\n1\ta fox, on the beach\n2\ta "red" bear\n'),
        ("a.JSONL", '{"prompt": "a fox, on the beach"}\n{"text": "a \\"red\\" bear", "prompt": "no"}\n'),
    ],
)
def test_captions_come_out_of_every_kind_of_file(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert texts(path) == WORDS
    first = next(iter(read(path, "captions")))
    assert first.scenes == (Scene(WORDS[0], described=True),) and first.scenes[0].shown == WORDS[0]
    assert (
        first.id == first.where
        and first.where.startswith(f"{name}:")
        and not holds_pictures(path, "captions")
    )


def test_captions_come_out_of_parquet_batch_by_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "AT_ONCE", 2)
    table = pyarrow.table({"seed": [1, 2, 3, 4, 5], "prompt": [*WORDS, None, "", "a cat"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert texts(tmp_path / "a.parquet") == [
        *WORDS, "its caption is None, expected words", "its caption is '', expected words", "a cat",
    ]  # fmt: skip
    assert [row.where for row in read(tmp_path / "a.parquet", "captions")][-1] == "a.parquet:5"


def test_a_parquet_file_that_is_none_is_said(tmp_path):
    with pytest.raises(BadInputError, match=r"a\.parquet cannot be read as \.parquet .* Copy it again"):
        texts(write(tmp_path, "a.parquet", "no table"))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "id,caption\n1,a fox\n2\n3,a bear\n", "caption is ''"),
        (
            "a.jsonl",
            '{"text": "a fox"}\n{"words": "b"}\n{"text": "a bear"}\n',
            "with caption or text or prompt",
        ),
        ("a.jsonl", '{"text": "a fox"}\n{\n{"text": "a bear"}\n', "not valid JSON"),
        ("a.jsonl", '{"text": "a fox"}\n{"text": 3}\n{"text": "a bear"}\n', "caption is 3"),
    ],
)
def test_a_row_without_a_caption_is_named_and_the_next_one_read(tmp_path, name, content, why):
    first, broken, last = texts(write(tmp_path, name, content))
    assert (first, last) == ("a fox", "a bear") and why in broken


def test_a_quotation_mark_that_is_never_closed_is_found_within_bounds(tmp_path):
    path = write(tmp_path, "a.csv", 'text\na fox\n"a bear\n' + "word word\n" * 30_000)
    first, broken, *_ = texts(path)
    assert first == "a fox" and "field larger than field limit" in broken


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "id,words\n1,a\n",
            r"its columns are id, words; expected one that is called caption or text",
        ),
        ("a.csv", "", "a.csv is empty; expected a column caption or text or prompt"),
        ("a.png", "", r"is a \.png file; expected captions in \.txt, \.csv, \.tsv, \.jsonl, \.parquet"),
        ("a", "", "is a nameless file; expected captions"),
    ],
)
def test_a_file_without_captions_is_refused(tmp_path, name, content, message):
    with pytest.raises(BadInputError, match=message):
        texts(write(tmp_path, name, content))


def test_an_empty_file_a_folder_and_one_that_is_not_there_are_said(tmp_path, capsys):
    assert main(["data", "check", str(write(tmp_path, "a.txt", "\n")), "--format", "captions"]) == 1
    assert "Nothing here can be trained on" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--format", "captions"]) == 2
    assert "is no file; expected captions" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "gone.txt"), "--format", "captions"]) == 2
    assert "Give a .txt with a caption a line" in capsys.readouterr().err


def test_a_large_file_is_read_in_bounded_memory(tmp_path):
    path = write(
        tmp_path, "a.txt", "".join(f"caption {n} of a long file of captions\n" for n in range(100_000))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(isinstance(row, Record) for row in read(path, "captions")) == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5_000  # kB; all of them are 60 MB


# stories


ITEMS = [
    {"text": "Draw.", "speaker": "user"}, {"text": "One."}, {"caption": "a fox"}, {"caption": "a bear"},
    {"text": "Two."}, {"picture": "a.png"},
]  # fmt: skip


@pytest.fixture
def mixed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return write(tmp_path, "stories.jsonl", json.dumps({"items": ITEMS}) + "\n")


@pytest.fixture
def record(mixed):
    return next(iter(read(mixed, "jsonl")))


def test_a_described_picture_finds_the_text_before_it(record):
    found = [
        (one.text, one.caption, one.described, one.pictured, one.picture is None) for one in record.scenes
    ]
    assert found == [
        ("Draw.", "", False, False, True), ("One.", "a fox", True, True, True), ("", "a bear", True, True, True),
        ("Two.", "", False, True, False),
    ]  # fmt: skip
    assert [one.shown for one in record.scenes] == ["Draw.", "a fox", "a bear", "Two."]
    assert [picture.name for picture in record.pictures] == ["a.png"]


def test_the_schema_knows_described_pictures():
    schema = json.loads(open("trainer/data/story.schema.json").read())
    jsonschema.validate({"items": ITEMS}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"items": [{"caption": " "}]}, schema)


def test_pictures_are_told_from_descriptions(mixed, tmp_path, capsys):
    assert holds_pictures(mixed, "jsonl")
    found = check(mixed, "jsonl", tmp_path / "out")
    assert (found.pictures, found.described) == (1, 2)
    assert "pictures that are only described: 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "check.json").read_text())["described"] == 2


def test_the_storybook_is_exported_without_pictures(tmp_path, capsys):
    given = ["data", "export", "--stories", "2", "--seed", "5", "--format"]
    assert main([*given, "jsonl", str(tmp_path / "drawn")]) == 0
    assert main([*given, "jsonl", "--captions-only", str(tmp_path / "told")]) == 0
    assert main([*given, "captions", str(tmp_path / "captions")]) == 0
    assert [path.name for path in (tmp_path / "told").iterdir()] == ["stories.jsonl"]
    drawn, told = (list(read(tmp_path / name / "stories.jsonl", "jsonl")) for name in ("drawn", "told"))
    for one, other in zip(drawn, told, strict=True):
        said = [[(s.text, s.caption, s.speaker, s.pictured) for s in each.scenes] for each in (one, other)]
        assert said[0] == said[1] and not other.pictures
    shown = [scene.shown for one in told for scene in one.scenes if scene.pictured]
    assert texts(tmp_path / "captions" / "captions.txt") == shown
    assert main([*given, "vist", "--captions-only", str(tmp_path / "no")]) == 2
    assert "vist has no rows without pictures. Formats that do: jsonl, captions" in capsys.readouterr().err


# tasks and sources


def make(name, record, seed=0):
    return TASKS[name](record, Tools(random.Random(seed), (), lambda picture: None))


def test_tasks_ask_for_described_pictures_as_for_others(record):
    turns, drawn = make("story", record)
    assert [(turn.text, turn.picture) for turn in turns] == [("One.", True), ("", True), ("Two.", True)]
    assert [scene.shown for scene in drawn] == ["a fox", "a bear", "Two."]
    assert {make("caption", record, seed)[1][0].shown for seed in range(20)} == {"a fox", "a bear", "Two."}
    asked = [make("picture_from_text", record, seed) for seed in range(20)]
    assert {drawn[0].shown for _, drawn in asked} == {"a fox", "Two."}


def test_what_a_picture_shows_is_asked_of_pictures_at_hand_alone(record):
    assert {make("understanding", record, seed)[0][-1].text for seed in range(20)} == {"Two."}
    assert make("understanding", Record("1", record.scenes[:3], "x:1")) is None


def source(llm, path, layout, task):
    return RecordSource(llm, Stream(path, layout), {task: Task()}, shown_share=0.0)


def test_a_source_gives_captions_without_pictures(tiny_llm, tmp_path):
    path = write(tmp_path, "a.txt", "\n".join(WORDS))
    found = source(tiny_llm, path, "captions", "caption")
    examples = found.sample(4, random.Random(0))["text"]
    assert {one.targets[0].caption for one in examples} == set(WORDS)
    assert not any(target.at_hand for one in examples for target in one.targets)
    assert set(found.captions(10)) == set(WORDS) and len(found.previews()) == 2


def test_a_source_of_both_says_which_are_at_hand(tiny_llm, mixed):
    (example,) = source(tiny_llm, mixed, "jsonl", "story").sample(1, random.Random(0))["text"]
    assert [target.at_hand for target in example.targets] == [False, False, True]


def test_stories_of_which_no_picture_is_known_end_in_an_error(tiny_llm, tmp_path):
    path = write(tmp_path, "a.jsonl", '{"items": [{"text": "Mia."}]}\n')
    with pytest.raises(BadInputError, match="the tasks story have no use for any of its records"):
        source(tiny_llm, path, "jsonl", "story").sample(1, random.Random(0))


def test_every_exported_caption_is_one_line(tmp_path):
    path = export_stories("captions", 3, 1, tmp_path / "out")
    assert len(texts(path)) == len(path.read_text().splitlines())
