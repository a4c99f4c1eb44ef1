"""A study: which stories are paired, what raters can see of them, and what is refused."""

import json

import pytest
from PIL import Image, ImageCms

from minigpt5_core.errors import BadInputError
from tests.ab.studies import contents
from trainer.ab.build import build_study
from trainer.ab.cli import run
from trainer.ab.study import load_study


def test_a_study_pairs_the_same_ids_and_says_what_is_left_over(tmp_path, systems, capsys):
    a, b = systems
    b.write_text("".join(b.read_text().splitlines(keepends=True)[1:]), encoding="utf-8")
    arguments = ["--a", str(a), "--b", str(b), "--out", str(tmp_path / "study"), "--pairs", "4"]
    assert run(["build", *arguments]) == 0
    said = capsys.readouterr().out
    assert "5 stories are in both files" in said
    assert f"1 are only in {a}, 0 only in {b}" in said and "4 pairs" in said
    study = load_study(tmp_path / "study")
    assert study.systems == {"a": "redsystem", "b": "bluesystem"}
    assert len({pair.story for pair in study.pairs}) == 4 and "story_000" not in str(study)


def test_each_side_shows_the_story_of_the_system_that_is_noted_for_it(folder):
    for pair in load_study(folder).pairs:
        for side, system in (("left", pair.winner("left")), ("right", pair.winner("right"))):
            picture = Image.open(folder / getattr(pair, side)[1]["picture"])
            assert (picture.getpixel((0, 0))[2] > 130) == (system == "a")
        assert pair.left[0] == {"text": f"Scene 0 of story {int(pair.story[-3:])}."}
        assert {pair.winner("left"), pair.winner("right")} == {"a", "b"} and pair.winner("tie") == "tie"


@pytest.mark.parametrize("seed", range(5))
def test_each_system_is_left_in_half_of_the_pairs(tmp_path, seed):
    from trainer.ab.build import _draw

    drawn = _draw([f"{number:03}" for number in range(51)], 50, seed)
    assert sum(left == "a" for _, left in drawn) == 25
    assert sorted(story for story, _ in drawn) != [story for story, _ in drawn]
    odd = [_draw(["x"], 5, seed)[0][1] for seed in range(20)]
    assert {"a", "b"} == set(odd)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_study(tmp_path, systems):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        build_study(*systems, tmp_path / name, pairs=4, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert load_study(tmp_path / "one") != load_study(tmp_path / "other")


def test_a_picture_is_its_pixels_alone(tmp_path):
    """Whatever the format, mode and metadata, equal pixels become equal bytes; transparent ones become white."""
    opaque = Image.new("RGB", (8, 8), (255, 0, 0))
    opaque.paste((255, 255, 255), (0, 0, 4, 8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    for name, picture in (("a", opaque), ("b", clear)):
        exif = Image.Exif()
        exif[0x0131] = name * 50
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if name == "a" else None
        picture.save(tmp_path / f"{name}.png", exif=exif, dpi=(72, 72), icc_profile=profile)
        line = json.dumps({"id": "s", "items": [{"picture": f"{name}.png"}]})
        (tmp_path / f"{name}.jsonl").write_text(line, encoding="utf-8")
    build_study(tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "study")
    left, right = ((tmp_path / "study/pictures" / f"0001_{side}_1.png") for side in ("left", "right"))
    assert left.read_bytes() == right.read_bytes()
    assert left.stat().st_mtime == right.stat().st_mtime == 0
    assert Image.open(left).info == {}


GOOD = '{"id": "story_000", "items": [{"text": "x"}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"b\.jsonl cannot be read"),
        ("", r"b\.jsonl holds no story"),
        ('{"id": "story_000"', r"b\.jsonl, line 1: not valid JSON"),
        (f"{GOOD}\n[" + "[" * 100_000, r"line 2: not valid JSON"),
        ('{"items": []}', r'line 1: found no text "id"'),
        (f"{GOOD}\n\n[3]", r'line 3: found no text "id"'),
        ('{"id": "x", "items": []}', r'line 1: "items" is \[\]'),
        ('{"id": "x", "items": [{"text": "y"}, {"txt": "z"}]}', r"line 1, item 2: found {'txt': 'z'}"),
        ('{"id": "x", "items": [{"text": 3}]}', r"line 1, item 1"),
        ('{"id": "x", "items": [{"text": "\\ud800"}]}', r"not valid Unicode"),
        (f"{GOOD}\n{GOOD}", r"line 2: id 'story_000' was in line 1"),
        (GOOD.replace("story_000", "z"), r"No id is in both files: .*'story_000'.*'z'"),
        ('{"id": "story_000", "items": [{"picture": "no.png"}]}', r"line 1: picture 'no.png' is not there"),
        ('{"id": "story_000", "items": [{"picture": "b.jsonl"}]}', r"'b.jsonl' cannot be read as a picture"),
    ],
)
def test_broken_input_is_named_by_file_and_line(tmp_path, systems, content, message):
    path = tmp_path / "in" / "b.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInputError, match=message):
        build_study(systems[0], path, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_study_is_never_written_over(tmp_path, systems, folder, capsys):
    before = contents(folder)
    arguments = ["build", "--a", str(systems[0]), "--b", str(systems[1]), "--out"]
    assert run([*arguments, str(folder)]) == 2
    assert "already holds a study" in capsys.readouterr().err
    assert run([*arguments, str(tmp_path / "in")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run([*arguments, str(systems[0] / "study")]) == 2
    assert contents(folder) == before


def test_two_systems_need_two_names_and_a_study_needs_a_pair(tmp_path, systems, capsys):
    same = ["build", "--a", str(systems[0]), "--b", str(systems[0]), "--out", str(tmp_path / "study")]
    assert run(same) == 2
    assert "--names" in capsys.readouterr().err
    assert run([*same, "--names", "x", "y", "--pairs", "0"]) == 2
    assert "--pairs is 0" in capsys.readouterr().err
    assert run([*same, "--names", "x", "y"]) == 0
    assert load_study(tmp_path / "study").systems == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"format_version": 2}', '{"format_version": 1, "pairs": []}']
)
def test_a_folder_without_a_study_says_how_to_make_one(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    assert run(["report", str(tmp_path)]) == 2
    assert "study.json" in capsys.readouterr().err
    assert run(["serve", str(tmp_path)]) == 2
