"""Data sets as people have them: every layout is read alike, and what is broken is said and left out."""

import json
import tarfile
from itertools import islice

import jsonschema
import numpy as np
import pytest
from PIL import Image

from minigpt5_core.errors import BadInputError
from trainer.cli import LAYOUTS, main
from trainer.data.check import check
from trainer.data.formats import FORMATS, read
from trainer.data.records import Broken, BrokenPicture, Picture, Record
from trainer.data.stream import Stream
from trainer.storybook.world.export import export_stories, picture_of
from trainer.storybook.world.stories import stories

STORIES, SEED = 3, 5
TOLD = ("jsonl", "vist", "mmdialog")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same three stories in every layout: where each is read from."""
    folder = tmp_path_factory.mktemp("data")
    return {layout: export_stories(layout, STORIES, SEED, folder / layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def told():
    return list(islice(stories(SEED), STORIES))


def test_the_command_knows_every_layout():
    assert tuple(FORMATS) == LAYOUTS


@pytest.mark.parametrize("layout", TOLD)
def test_a_story_comes_back_from_every_layout(exported, told, layout):
    records = list(read(exported[layout], layout))
    for number, (record, story) in enumerate(zip(records, told, strict=True)):
        scenes = [scene for scene in record.scenes if scene.speaker == "assistant"]
        assert [scene.text for scene in scenes] == [scene.text for scene in story]
        if layout != "vist":
            asked = [scene.text for scene in record.scenes if scene.speaker == "user"]
            assert asked == [scene.request for scene in story]
        for index, (scene, true) in enumerate(zip(scenes, story, strict=True)):
            assert_same_picture(
                scene.picture, picture_of(SEED, number, index, true), exact=layout != "mmdialog"
            )


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in (*TOLD, "captions")])
def test_captioned_pictures_come_back_from_every_layout(exported, told, layout):
    records = list(read(exported[layout], layout))
    scenes = [(n, i, scene) for n, story in enumerate(told) for i, scene in enumerate(story)]
    assert [record.scenes[0].text for record in records] == [scene.caption for _, _, scene in scenes]
    for record, (number, index, scene) in zip(records, scenes, strict=True):
        assert_same_picture(record.pictures[0], picture_of(SEED, number, index, scene))


def assert_same_picture(found, true, exact=True):
    difference = np.abs(np.asarray(found.open(), float) - np.asarray(true, float))
    assert difference.max() == 0 if exact else difference.mean() < 4  # .jpg


def test_exported_stories_obey_the_schema(exported):
    schema = json.loads(open("trainer/data/story.schema.json").read())
    for line in exported["jsonl"].read_text().splitlines():
        jsonschema.validate(json.loads(line), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"items": [{"text": "a", "picture": "b"}]}, schema)


def test_pictures_and_texts_find_each_other(tmp_path):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    items = [
        {"picture": "a.png"}, {"text": "One."}, {"text": "Two."}, {"picture": "b.png", "caption": "b"},
        {"picture": "c.png"}, {"text": "Go on.", "speaker": "user"},
    ]  # fmt: skip
    (tmp_path / "stories.jsonl").write_text(json.dumps({"items": items}) + "\n")
    (record,) = read(tmp_path / "stories.jsonl", "jsonl")
    found = [(scene.text, scene.picture and scene.picture.name, scene.speaker) for scene in record.scenes]
    assert found == [
        ("", "a.png", "assistant"), ("One.", None, "assistant"), ("Two.", "b.png", "assistant"),
        ("", "c.png", "assistant"), ("Go on.", None, "user"),
    ]  # fmt: skip
    assert (record.id, record.scenes[2].caption) == ("stories.jsonl:1", "b")


BROKEN = {
    "jsonl": [
        ("{", "not valid JSON"),
        ('{"items": []}', "at least one item"),
        ('{"items": [{"text": ""}]}', "expected words"),
        ('{"items": [{"picture": "gone.png"}]}', "picture gone.png is missing"),
        ('{"items": [{"txt": "a"}]}', "either text"),
        ('{"items": [{"caption": " "}]}', "caption is ' ', expected words"),
        ('{"items": [{"text": "a", "speaker": "bot"}]}', "speaker 'bot'"),
        ('{"items": [{"text": "a", "x": 1}]}', "unknown x"),
    ],
    "cc3m": [
        ("a dog\tgone.jpg", "picture gone.jpg is missing"),
        ("\tgone.jpg", "caption is ''"),
        ("a dog", "its picture is ''"),
        ("a\tdog\tgone.jpg", "it has 3 columns, expected 2"),
    ],
    "mmdialog": [
        ("[]", "conversation_id"),
        ('{"conversation": []}', "is empty"),
        ('{"conversation": [{"turn": []}]}', "a turn is empty"),
        ('{"conversation": [{"turn": [{"__MEDIA__": 7}]}]}', "picture 7.jpg is missing"),
    ],
}


@pytest.mark.parametrize(
    ("layout", "line", "why"), [(layout, *row) for layout, rows in BROKEN.items() for row in rows]
)
def test_a_broken_line_is_named_and_the_next_one_read(exported, layout, line, why):
    file = exported[layout].with_name(f"broken{exported[layout].suffix}")
    whole = exported[layout].read_text().splitlines()
    file.write_text("\n".join([whole[0], whole[1], line, whole[2]]) + "\n")
    rows = list(read(file, layout))
    broken = [row for row in rows if isinstance(row, Broken)]
    assert len(broken) == 1 and why in broken[0].why and broken[0].where == f"{file.name}:3"
    assert len(rows) == (3 if layout == "cc3m" else 4)


def test_vist_says_which_image_id_has_no_file(exported, tmp_path):
    rows = {"7": [{"caption": "a", "image_id": "x", "sequence_index": 0}], "8": []}
    (tmp_path / "train_cleaned.json").write_text(json.dumps(rows))
    with pytest.raises(BadInputError, match=r"needs train_image_mapping\.json beside it"):
        list(read(tmp_path / "train_cleaned.json", "vist"))
    (tmp_path / "train_image_mapping.json").write_text("{}")
    first, second = read(tmp_path / "train_cleaned.json", "vist")
    assert "image id x has no file" in first.why and first.where == "train_cleaned.json:7"
    assert "expected a list" in second.why


def test_a_vist_file_is_read_as_far_as_it_is_whole(exported, tmp_path):
    """No more than a story is held at a time, so what is broken behind is found on the way."""
    whole = exported["vist"].read_text()
    copy = exported["vist"].with_name("half_cleaned.json")
    mapping = exported["vist"].with_name("train_image_mapping.json")
    mapping.with_name("half_image_mapping.json").write_text(mapping.read_text())
    copy.write_text(whole[: len(whole) * 2 // 3])
    *rows, last = read(copy, "vist")
    assert rows and all(isinstance(row, Record) for row in rows) and len(rows) < len(json.loads(whole))
    assert "the JSON is broken" in last.why and last.where == f"half_cleaned.json: after {rows[-1].id}"
    copy.write_text("[]")
    with pytest.raises(BadInputError, match="does not begin as one JSON object"):
        list(read(copy, "vist"))


def test_a_folder_may_hold_its_captions_in_one_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, content in {
        "metadata.csv": 'file_name,text\na.png,"a dog, running"\n,nothing\n',
        "metadata.jsonl": '{"file_name": "a.png", "caption": "a dog, running"}\n{"file_name": ""}\n',
    }.items():
        (tmp_path / name).write_text(content)
        record, broken = read(tmp_path, "folder")
        assert record.scenes[0].text == "a dog, running" and isinstance(broken, Broken), name


def test_a_picture_without_caption_and_a_sample_without_picture_are_named(exported, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (row,) = read(tmp_path, "folder")
    assert (row.where, row.why) == ("a.png", "its caption a.txt is missing")
    shard = tmp_path / "x.tar"
    (tmp_path / "k.txt").write_text("a dog")
    with tarfile.open(shard, "w") as file:
        file.add(tmp_path / "k.txt", "k.txt")
    (row,) = read(shard, "webdataset")
    assert row.where == "x.tar:k" and "holds no picture" in row.why


def test_a_shard_cut_short_is_said_and_what_stands_before_is_read(exported, tmp_path):
    whole = next(exported["webdataset"].glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    rows = list(read(tmp_path / "cut.tar", "webdataset"))
    assert len(rows) > 2 and all(isinstance(row, Record) for row in rows[:-1])
    assert isinstance(rows[-1], Broken) and "breaks off" in rows[-1].why


def test_truncated_missing_and_huge_pictures_are_told_apart(tmp_path):
    Image.effect_noise((40, 40), 90).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for content, why in ((whole[:-200], "cannot be decoded"), (b"no picture", "cannot be decoded")):
        with pytest.raises(BrokenPicture, match=why):
            Picture("a", content=content).open()
    with pytest.raises(BrokenPicture, match="is missing"):
        Picture("a", tmp_path / "gone.png").open()
    Image.new("1", (10_001, 1)).save(tmp_path / "wide.png")
    with pytest.raises(BrokenPicture, match="at most 10000"):
        Picture("wide", tmp_path / "wide.png").open()


def test_check_reports_counts_sizes_and_what_is_broken(exported, tmp_path, capsys):
    folder = export_stories("folder", 2, 1, tmp_path / "data")
    first = sorted(folder.glob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    found = check(folder, "folder", tmp_path / "out")
    assert (found.rows, found.pictures, len(found.broken)) == (len(list(folder.glob("*.png"))) - 1,) * 2 + (
        1,
    )
    assert f"broken  {first.name}: {first.name} cannot be decoded" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report["picture_sizes"] == [[128, 128, found.pictures]]
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_the_command_says_by_its_exit_code_whether_anything_is_usable(exported, tmp_path, capsys):
    assert main(["data", "check", str(exported["vist"]), "--format", "vist"]) == 0
    (tmp_path / "empty.jsonl").write_text("{}\n")
    assert main(["data", "check", str(tmp_path / "empty.jsonl"), "--format", "jsonl"]) == 1
    assert "Nothing here can be trained on" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "gone"), "--format", "jsonl"]) == 2
    assert main(["data", "check", str(tmp_path), "--format", "coco"]) == 2
    assert "Known: folder, jsonl" in capsys.readouterr().err


# the stream


def ids(stream, count):
    return [record.id for record in islice(iter(stream), count)]


def test_an_epoch_has_every_row_once_and_the_next_another_order(exported):
    count = len(list(read(exported["cc3m"], "cc3m")))
    drawn = ids(Stream(exported["cc3m"], "cc3m", seed=1), 2 * count)
    assert sorted(drawn[:count]) == sorted(drawn[count:]) == sorted(set(drawn))
    assert drawn[:count] != drawn[count:]
    assert drawn == ids(Stream(exported["cc3m"], "cc3m", seed=1), 2 * count)
    assert drawn != ids(Stream(exported["cc3m"], "cc3m", seed=2), 2 * count)


@pytest.mark.parametrize("taken", [1, 7, 20])
def test_a_stream_goes_on_exactly(exported, taken):
    whole = ids(Stream(exported["cc3m"], "cc3m", buffer=4), 40)
    first = Stream(exported["cc3m"], "cc3m", buffer=4)
    assert ids(first, taken) == whole[:taken]
    again = Stream(exported["cc3m"], "cc3m", buffer=4)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(again, 40 - taken) == whole[taken:]


def test_processes_share_an_epoch_without_an_example_twice(exported):
    count = len(list(read(exported["cc3m"], "cc3m")))
    parts = [
        ids(Stream(exported["cc3m"], "cc3m", rank=rank, world=2), len(range(rank, count, 2)))
        for rank in range(2)
    ]
    assert sorted(parts[0] + parts[1]) == sorted({*parts[0], *parts[1]}) and len(parts[0] + parts[1]) == count


def test_broken_rows_are_counted_and_nothing_takes_their_place(exported, tmp_path):
    file = exported["jsonl"].with_name("some.jsonl")
    file.write_text(exported["jsonl"].read_text() + "{\n{\n")
    stream = Stream(file, "jsonl")
    assert sorted(ids(stream, 3)) == ["00000", "00001", "00002"]
    next(iter(stream))  # the next epoch has begun, so this one's broken rows are all counted
    assert stream.skipped >= 2
    (tmp_path / "none.jsonl").write_text("{\n")
    with pytest.raises(BadInputError, match="not one row of it is usable"):
        next(iter(Stream(tmp_path / "none.jsonl", "jsonl")))
