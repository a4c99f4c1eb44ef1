"""The benchmark and the ablations on tiny parts: what is drawn, kept, measured and reported."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.story.prompts import Turn
from trainer.cli import _evaluation, _parser, main
from trainer.common.recipe import load_recipe
from trainer.data.formats import read
from trainer.data.records import Record
from trainer.evaluation.drawing import DrawnScene
from trainer.evaluation.evaluate import EvaluateRecipe, evaluate, load_teller
from trainer.evaluation.gallery import Gallery, fingerprint
from trainer.llm.sequences import story_sequence
from trainer.storybook.benchmark.ablate import read_variants, run_ablations, text_loss
from trainer.storybook.benchmark.evaluate import (
    SYSTEMS,
    StorybookEvaluateRecipe,
    evaluate_storybook,
    single_captions,
)
from trainer.storybook.benchmark.measure import COLUMNS, Measured, summarise
from trainer.storybook.benchmark.score import ScoreRecipe, score_storybook, shares
from trainer.storybook.models.caption_baseline import CaptionAdapterRecipe, train_caption_adapter
from trainer.storybook.world.export import export_stories
from trainer.storybook.world.state import held_out
from trainer.storybook.world.stories import stories

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    """An evaluation of two stories in one step, all systems."""
    folder, parts = trained
    run, captions = folder / "align", tmp_path_factory.mktemp("captions")
    train_caption_adapter(CaptionAdapterRecipe(llm=parts["llm"], stories=4, steps=1), captions)
    return StorybookEvaluateRecipe(
        **parts, adapter=str(run / "adapter"), mapper=str(run / "mapper.safetensors"), stories=2, steps=1, captions=2,
        reference_mapper=str(run / "mapper.safetensors"), caption_adapter=str(captions / "adapter"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate")
    evaluate_storybook(small, out)
    return out


@pytest.mark.slow
def test_a_report_has_every_row_and_column_with_an_interval_or_nothing(report):
    found = json.loads((report / "report.json").read_text())
    assert tuple(found["rows"]) == SYSTEMS
    for cells in found["rows"].values():
        assert tuple(cells) == COLUMNS
        assert all(cell is None or cell["low"] <= cell["mean"] <= cell["high"] for cell in cells.values())
    assert found["rows"]["two_stage"]["caption_hero"] is None and found["rows"]["oracle"]["fid"] is None
    assert found["rows"]["vokens"]["llm_tokens_per_scene"]["mean"] == 8


@pytest.mark.slow
def test_rows_that_draw_the_same_differ_in_nothing(report):
    """The reference mapper is given the same file here, so both rows draw the same pictures."""
    cells = json.loads((report / "report.json").read_text())["differences"]["vokens-vokens_reference"]
    same = {name: cells[name]["mean"] for name in ("hero", "prop", "place", "time", "image_similarity")}
    assert same == dict.fromkeys(same, 0.0)


@pytest.mark.slow
def test_the_page_shows_strips_that_are_there(report):
    page = (report / "report.html").read_text()
    files = re.findall(r'src="([^"]+)"', page)
    assert (
        len(files) == 2 * (len(SYSTEMS) + 1) + 2
    )  # two stories, all rows and the true pictures; two rows of captions
    assert all((report / file).is_file() for file in files)
    assert (report / "report.md").read_text().startswith("| | vokens |")
    stories = [json.loads(line) for line in (report / "vokens.jsonl").read_text().splitlines()]
    assert [story["id"] for story in stories] == ["story_000", "story_001"]
    assert all((report / item["picture"]).is_file() for story in stories for item in story["items"][1::2])
    with Image.open(report / "three_ways.png") as sheet:
        assert sheet.width > 4 * 192


@pytest.mark.slow
def test_what_was_drawn_is_not_drawn_again(report, small):
    before, written = json.loads((report / "report.json").read_text()), drawn_at(report)
    assert evaluate_storybook(small, report) == before
    assert written and drawn_at(report) == written


def drawn_at(out):
    """When each system's pictures were written, and into which file; the true ones are written every time."""
    files = [file for file in (out / "pictures").rglob("*.png") if "true" not in file.parts]
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}


def test_other_weights_are_drawn_anew(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(b"one")
    first = fingerprint({"seed": 1}, [weights])
    assert first == fingerprint({"seed": 1}, [weights]) != fingerprint({"seed": 2}, [weights])
    gallery = Gallery(tmp_path / "row", first)
    pictures = [Image.effect_noise((6, 4), 90).convert("RGB") for _ in range(3)]
    gallery.save(0, [DrawnScene(picture, index, index / 3) for index, picture in enumerate(pictures)])
    assert gallery.has(0) and not gallery.has(1)
    again = gallery.load(0)
    assert [np.array_equal(one.picture, picture) for one, picture in zip(again, pictures, strict=True)] == [
        True
    ] * 3
    assert [(one.llm_tokens, one.seconds) for one in again] == [(0, 0.0), (1, 0.3333), (2, 0.6667)]
    (weights / "a.safetensors").write_bytes(b"two")
    assert not Gallery(tmp_path / "row", fingerprint({"seed": 1}, [weights])).has(0)


@pytest.mark.slow
def test_two_processes_share_the_stories_and_report_the_same(report, small, tmp_path):
    given = [f"--set={name}={value}" for name, value in parts_of(small).items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "trainer", "evaluate",
        "--out", str(tmp_path / "out"), "--stories", "2", "--set=steps=1", "--set=captions=2", *given,
    ]  # fmt: skip
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # or each would take every core
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 1/1") == 2 + 1  # a story each, and one of them the sheet of captions
    one, two = (json.loads((out / "report.json").read_text())["rows"] for out in (report, tmp_path / "out"))
    for name in SYSTEMS:
        for cells in (one[name], two[name]):
            cells.pop("seconds_per_scene")
        assert one[name] == two[name]


def parts_of(recipe):
    """The settings that name this recipe's parts."""
    names = ("llm", "diffusion", "adapter", "mapper", "reference_mapper", "caption_adapter")
    return {name: getattr(recipe, name) for name in names}


@pytest.mark.slow
def test_a_system_whose_weights_are_missing_is_left_out_and_said(small, tmp_path, capsys):
    recipe = replace(
        small,
        stories=1,
        captions=1,
        systems=("vokens", "two_stage_caption"),
        caption_adapter=str(tmp_path / "none"),
    )
    assert list(evaluate_storybook(recipe, tmp_path / "out")["rows"]) == ["vokens"]
    assert "system two_stage_caption is left out" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [EvaluateRecipe, StorybookEvaluateRecipe])
def test_an_unknown_system_is_named(kind):
    with pytest.raises(BadInputError, match="unknown nonsense. Known: vokens, .*oracle.$"):
        kind(systems=("nonsense",))


def test_a_system_that_was_removed_is_said_to_be():
    with pytest.raises(
        BadInputError, match="unknown vokens_consistent. Known: .* was removed: docs/findings.md"
    ):
        StorybookEvaluateRecipe(systems=("vokens", "vokens_consistent"))


def test_the_old_word_for_systems_goes_on_working_and_the_last_one_given_counts(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('rows = ["oracle"]')
    assert load_recipe(StorybookEvaluateRecipe, recipe, []).systems == ("oracle",)
    assert capsys.readouterr().out == "rows is called systems now; the old name goes on working.\n"
    assert load_recipe(EvaluateRecipe, recipe, ['systems=["vokens"]']).systems == ("vokens",)
    recipe.write_text('systems = ["oracle"]')
    assert load_recipe(EvaluateRecipe, recipe, ['rows=["vokens"]']).systems == ("vokens",)


def test_the_shipped_recipe_of_the_benchmark_is_one():
    recipe = load_recipe(StorybookEvaluateRecipe, Path("trainer/recipes/storybook_evaluate.toml"), [])
    assert (recipe.stories, recipe.seed, recipe.systems) == (100, 7, SYSTEMS)


@pytest.mark.slow
def test_the_caption_baselines_adapter_holds_lora_alone(small):
    """Vokens have made the embeddings longer, which PEFT would by itself save whole."""
    names = load_file(Path(small.caption_adapter) / "adapter_model.safetensors")
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)


ABLATIONS = """
[align]
captions = 4
steps = 1
batch = 2
[finetune]
stories = 2
steps = 1
batch = 1
[evaluate]
stories = 1
captions = 1
steps = 1
[variants.default]
[variants."no stage 2"]
finetune = { steps = 0 }
"""


@pytest.mark.slow
def test_ablations_train_and_measure_each_variant_once(trained, tmp_path):
    _, parts = trained
    recipe = tmp_path / "recipe.toml"
    paths = "".join(f'{name} = "{value}"\n' for name, value in parts.items())
    text = ABLATIONS
    for table in ("[align]", "[finetune]", "[evaluate]"):
        text = text.replace(table, f"{table}\n{paths}")
    recipe.write_text(text)
    table = run_ablations(recipe, tmp_path / "out")
    assert list(table) == ["default", "no stage 2"]
    stages = [
        json.loads(file.read_text())["stage"] for file in (tmp_path / "out" / "trained").glob("*/run.json")
    ]
    assert sorted(stages) == ["align", "finetune"]  # both variants begin with the same stage 1
    assert (tmp_path / "out" / "ablations.md").read_text().count("\n") == 4
    assert table["default"]["text_loss"]["mean"] > 0
    again = run_ablations(recipe, tmp_path / "out", lambda *given: pytest.fail("measured again"))
    assert again == table


@pytest.mark.slow
def test_the_text_loss_is_the_librarys_own_mean_over_the_held_out_stories(small):
    causal_lm = (llm := load_teller(small).llm).causal_lm
    losses = []
    for story in islice(stories(small.seed, "test"), 2):
        sequence = story_sequence(llm, [Turn(scene.request, scene.text) for scene in story])
        ids, labels = (torch.tensor([row]) for row in (sequence.ids, sequence.labels))
        losses.append(causal_lm(input_ids=ids, labels=labels).loss.item())
    assert text_loss(small)["mean"] == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize(
    "text", ["[variants]", "[alinn]\nsteps = 1\n[variants.a]", "[variants.a]\nalinn = {}", "["]
)
def test_a_recipe_of_ablations_that_says_nothing_or_too_much_is_refused(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(BadInputError, match="recipe.toml"):
        read_variants(tmp_path / "recipe.toml")


def test_the_shipped_ablations_are_recipes():
    variants = read_variants(Path("trainer/recipes/storybook_ablations.toml"))
    assert variants["2 vokens"].align.model.vokens == 2 and variants["default"].align.optim.steps == 700
    assert variants["no stage 2"].finetune is None
    assert {variant.evaluate.systems for variant in variants.values()} == {("vokens",)}


def test_an_ablations_old_word_for_systems_goes_on_working(tmp_path):
    (tmp_path / "recipe.toml").write_text('[evaluate]\nrows = ["oracle"]\n[variants.a]')
    assert read_variants(tmp_path / "recipe.toml")["a"].evaluate.systems == ("oracle",)


def on_data(small, path, layout, **more):
    """The same parts, one step a picture, on a data set."""
    parts = {name: getattr(small, name) for name in ("llm", "diffusion", "adapter", "mapper")}
    return EvaluateRecipe(**parts, stories=2, steps=1, data=str(path), format=layout, **more)


@pytest.mark.slow
@pytest.mark.parametrize("write", [True, False])
def test_a_data_set_is_evaluated_into_the_same_kind_of_report(small, tmp_path, write):
    path = export_stories("vist", 2, 4, tmp_path / "data")
    recipe = on_data(small, path, "vist", write=write, max_new_tokens=3)
    found = evaluate(recipe, tmp_path / "out")
    assert list(found["rows"]) == ["vokens", "two_stage", "oracle"]
    for cells in found["rows"].values():
        assert (
            cells["abstained"]["mean"] == 0 and cells["llm_tokens_per_scene"] and cells["seconds_per_scene"]
        )
        assert cells["clip_i"] is None
    assert "clip" in found["reasons"]["clip_i"]
    assert found["rows"]["oracle"]["rouge_l"]["mean"] == 1  # its texts are the true ones
    assert (found["rows"]["vokens"]["rouge_l"]["mean"] < 1) == write
    assert found["differences"]["vokens-oracle"]["rouge_l"]["mean"] <= 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 stories of train_cleaned.json" in page and "What was not measured" in page
    lines = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert lines[0] == "row,column,mean,low,high" and any(
        line.startswith("oracle,rouge_l,1.0") for line in lines
    )
    written = list(read(tmp_path / "out" / "vokens.jsonl", "jsonl"))
    assert len(written) == 2 and all(isinstance(story, Record) for story in written)


WITHOUT_STORYBOOK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition("trainer.storybook")[1]:
            raise ImportError(f"{name} is not for this test")

sys.meta_path.insert(0, Blocked())
from trainer.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_data_set_is_evaluated_without_the_storybook(small, tmp_path):
    items = [
        {"text": "A red page."},
        {"picture": "red.png"},
        {"text": "A blue page."},
        {"picture": "blue.png"},
    ]
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"id": "one", "items": items}) + "\n")
    parts = [f"--set={name}={getattr(small, name)}" for name in ("llm", "diffusion", "adapter", "mapper")]
    command = [
        sys.executable, "-c", WITHOUT_STORYBOOK, "evaluate", "--data", str(tmp_path / "mine.jsonl"), "--stories", "1",
        "--out", str(tmp_path / "out"), "--set=steps=1", "--set=max_new_tokens=3", *parts,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["rows"]) == ["vokens", "two_stage", "oracle"]
    assert (found["settings"]["data"], found["settings"]["scenes"]) == ("mine.jsonl", 2)
    with Image.open(tmp_path / "out" / "pictures" / "true" / "story_000" / "1.png") as true:
        assert true.getpixel((9, 9)) == (255, 0, 0)


def test_an_evaluation_on_data_needs_some():
    with pytest.raises(BadInputError, match="data is not set"):
        evaluate(EvaluateRecipe(), Path("nowhere"))
    with pytest.raises(BadInputError, match=r"data is mine.jsonl, but this is the storybook's benchmark"):
        StorybookEvaluateRecipe(data="mine.jsonl")


def asked_for(*arguments):
    """The program and the recipe that the command line chooses."""
    return _evaluation(_parser().parse_args(["evaluate", "--out", "out", *arguments]))


def test_the_command_line_names_data_format_and_systems():
    arguments = ["--data", "d.json", "--format", "vist", "--systems", "vokens,oracle", "--stories", "3"]
    program, recipe = asked_for(*arguments)
    assert program is evaluate
    found = (recipe.data, recipe.format, recipe.systems, recipe.stories)
    assert found == ("d.json", "vist", ("vokens", "oracle"), 3)


def test_the_source_chooses_the_program_wherever_it_is_named(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = "d.jsonl"')
    assert asked_for("--recipe", str(recipe))[0] is asked_for("--set", "data=d.jsonl")[0] is evaluate
    assert asked_for("--recipe", str(recipe), "--set", 'data=""')[0] is asked_for()[0] is evaluate_storybook
    keys = (
        "--set",
        "captions=3",
        "--set",
        "split=validation",
        "--set",
        "write=false",
    )  # write is about data: it counts for nothing
    assert asked_for(*keys)[1] == StorybookEvaluateRecipe(captions=3, split="validation", write=False)


def test_what_is_the_storybooks_alone_is_left_out_on_data_and_said(capsys):
    given = [
        "--data",
        "d.jsonl",
        "--set",
        "split=test",
        "--recipe",
        "trainer/recipes/storybook_evaluate.toml",
    ]
    _, recipe = asked_for(*given, "--systems", "vokens_reference,oracle")
    assert recipe == EvaluateRecipe(data="d.jsonl", systems=("oracle",))
    assert capsys.readouterr().out.strip().endswith(": captions, split, vokens_reference")


def test_systems_that_a_data_set_cannot_have_are_named(tmp_path, capsys):
    given = ["--data", "d.jsonl", "--systems", "vokens_reference", "--out", str(tmp_path)]
    assert main(["evaluate", *given]) == 2
    message = "vokens_reference need the storybook's world. On data: vokens, two_stage, oracle."
    assert message in capsys.readouterr().err


def test_settings_are_chosen_on_stories_that_are_neither_measured_nor_trained_on():
    chosen, measured = (
        single_captions(StorybookEvaluateRecipe(split=split, captions=30)) for split in ("validation", "test")
    )
    assert all(held_out(scene.state) for sheet in measured for scene in sheet)
    assert not any(held_out(scene.state) for sheet in chosen for scene in sheet)
    first = {split: next(stories(7, split)) for split in ("train", "validation", "test")}
    assert not any(held_out(scene.state) for scene in first["validation"])
    assert len({" ".join(scene.text for scene in told) for told in first.values()}) == 3
    with pytest.raises(BadInputError, match="split is 'dev'; it can be test or validation"):
        StorybookEvaluateRecipe(split="dev")


def test_a_report_has_the_frechet_distance_where_there_are_pictures_enough():
    """All features moved by (3, 4): the distance of the normal distributions is 3^2 + 4^2, whatever is resampled."""
    told = [next(stories(seed, "test")) for seed in range(90)]
    count = sum(map(len, told))
    features = np.random.default_rng(0).normal(size=(count, 2))
    for few, expected in ((told, {"mean": 25.0, "low": 25.0, "high": 25.0}), (told[:9], None)):
        part = sum(map(len, few))
        found = {"vokens": Measured({}, features[:part] + np.array([3.0, 4.0]))}
        assert summarise(few, found, features[:part], {})["rows"]["vokens"]["fid"] == expected


def test_shares_are_of_the_scenes_whose_sentence_names_a_kind_or_none():
    first = next(stories(0, "test"))[:4]
    scenes = [replace(scene, names_kind=index < 1) for index, scene in enumerate(first)]
    seen = [scene.state for scene in scenes]
    other = next(hero for hero in ("fox", "wolf") if hero != seen[1].hero)
    seen[1] = replace(seen[1], hero=other)
    found = shares(scenes, seen)
    assert found == {"hero": 0.75, "hero_named": 1, "hero_unnamed": 0.6667, "prop": 1, "place": 1, "time": 1}


@pytest.mark.slow
def test_the_quick_score_writes_shares_and_a_sheet_for_each_system(small, tmp_path):
    parts = {name: getattr(small, name) for name in ("llm", "diffusion", "adapter", "mapper")}
    assert not score_storybook(ScoreRecipe(**parts, stories=1, steps=1), tmp_path)  # what is drawn is noise
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found) == ["scenes", "vokens", "oracle"] and found["scenes"] == len(next(stories(0, "test")))
    assert set(found["vokens"]) == {"hero", "hero_named", "hero_unnamed", "prop", "place", "time"}
    assert (tmp_path / "vokens.png").is_file() and (tmp_path / "oracle.png").is_file()
