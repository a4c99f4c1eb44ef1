"""Training with pictures, on a tiny LLM: where losses fall, what learns, and the commands end to end."""

import json
import random
import shutil
from dataclasses import astuple, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_llm, load_sight
from minigpt5_core.prompts import DESCRIBE, LOOK, Turn
from minigpt5_core.vision import ImageEncoder, ImageEncoderConfig, load_image_adapter
from minigpt5_core.weights import IMAGE_ADAPTER, load_mapper
from trainer import ablate
from trainer.ablate import read_variants, run_ablations
from trainer.align import AlignRecipe, train_align
from trainer.caption_adapter import (
    CaptionAdapterRecipe,
    caption_prompt,
    captioned_turns,
    train_caption_adapter,
)
from trainer.evaluate import COLUMNS, ROWS, EvaluateRecipe, evaluate
from trainer.finetune import FinetuneRecipe, story_losses, story_sequence, train_finetune
from trainer.image_adapter import ImageAdapterRecipe, read_caption, train_image_adapter
from trainer.mapper_only import MapperRecipe, train_mapper
from trainer.recipe import load_recipe
from trainer.showing import caption_turns, questions, shown_turns, told_scenes
from trainer.storybook.identity import identity
from trainer.storybook.render import render
from trainer.storybook.stories import change_a_fact, random_state, stories, training_state
from trainer.storybook.world import State, held_out

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def seeing(tiny_llm):
    torch.manual_seed(0)
    config = ImageEncoderConfig(llm_width=32, tokens=3, channels=[4, 4, 4, 4], hidden=12, heads=2, layers=1)
    tiny_llm.image_encoder = ImageEncoder(config).eval()
    return tiny_llm


@pytest.fixture(scope="module")
def trained(tiny_llm_folder, tiny_diffusion_folder, tmp_path_factory):
    """An aligned run and an image adapter trained with it, each in a few steps."""
    folder = tmp_path_factory.mktemp("seeing")
    llm = Path(
        shutil.copytree(tiny_llm_folder, folder / "llm")
    )  # a token a letter: a story needs more context
    config = (llm / "config.json").read_text()
    (llm / "config.json").write_text(
        config.replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096')
    )
    parts = {"llm": str(llm), "diffusion": str(tiny_diffusion_folder)}
    train_align(AlignRecipe(**parts, captions=8, steps=1, batch=2), folder / "align")
    recipe = ImageAdapterRecipe(
        **parts, adapter=str(folder / "align" / "adapter"), mapper=str(folder / "align" / "mapper.safetensors"),
        tokens=4, word_steps=2, word_batch=2, story_steps=1, story_batch=1, caption_batch=1, pictures=2,
    )  # fmt: skip
    train_image_adapter(recipe, folder / "sight")
    return folder, parts


def test_a_shown_picture_takes_its_places_and_teaches_nothing(seeing):
    image = torch.randn(3, 32)
    sequence = story_sequence(
        seeing, [Turn(LOOK, "A fox.", picture=False, shown=image), Turn(DESCRIBE, "b", False)]
    )
    assert sequence.ids.count(seeing.picture_id) == 3
    taught = [token for token in sequence.labels if token != -100]
    assert taught == [*seeing.encode("A fox."), *seeing.encode("b"), seeing.tokenizer.eos_token_id]


def test_a_batch_with_pictures_gives_each_storys_own_states(seeing):
    image = torch.randn(3, 32)
    one = story_sequence(seeing, [Turn(LOOK, "A fox.", shown=image), Turn("x", "y")])
    other = story_sequence(seeing, [Turn("a", "b")])
    together, _ = story_losses(seeing, [one, other])
    apart = torch.cat([story_losses(seeing, [part])[0] for part in (one, other)])
    assert torch.allclose(together, apart, atol=1e-4)


def test_the_loss_behind_a_picture_reaches_the_encoder_and_not_the_llm(seeing):
    turns = questions(seeing, 1, random.Random(0))[0]
    story_losses(seeing, [story_sequence(seeing, [turns[0], Turn(DESCRIBE, "a fox")])])[1].backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in seeing.image_encoder.projector.parameters()
    )
    assert all(p.grad is None for p in seeing.causal_lm.parameters())


def test_a_story_ends_in_a_scene_of_the_llms_own(seeing):
    draw = random.Random(1)
    for scenes in islice(stories(1), 20):
        turns = shown_turns(seeing, scenes, draw)
        assert turns[-1].picture and len(turns) == len(scenes)
        assert all(turn.picture or turn.shown is not None for turn in turns)
        assert len(told_scenes(scenes, turns)) == len(story_sequence(seeing, turns).blocks)


def test_every_caption_of_the_world_is_read_back():
    draw = random.Random(2)
    for _ in range(300):
        state = random_state(draw)
        assert read_caption(f"Well, {state.caption()}.") == state
    assert read_caption("a castle in the forest by day") is None


def test_an_image_adapter_is_trained_and_lets_its_llm_see(trained, tiny_llm_folder):
    folder, _ = trained
    file = folder / "sight" / IMAGE_ADAPTER
    encoder, header = load_image_adapter(file)
    assert encoder.config.tokens == 4 and header.trained["stage"] == "image adapter"
    llm = load_sight(load_llm(tiny_llm_folder), tiny_llm_folder, file)
    assert llm.see(torch.rand(64, 64, 3)).shape == (4, 32)


def test_stories_with_pictures_finetune_and_leave_the_encoder_as_it_was(trained, tmp_path):
    folder, parts = trained
    file = folder / "sight" / IMAGE_ADAPTER
    before = load_file(file)
    recipe = FinetuneRecipe(
        **parts,
        image_adapter=str(file),
        shown_share=1.0,
        questions=1,
        captions=1,
        stories=2,
        steps=2,
        batch=1,
        image_weight=0.0,
    )
    llm, _ = train_finetune(recipe, tmp_path / "run", folder / "align")
    after = llm.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_mapper_alone_learns_on_what_the_adapter_says(trained, tmp_path):
    folder, parts = trained
    recipe = MapperRecipe(
        **parts, stories=1, captions=1, steps=2, batch=2, image_weight=0.0,
        image_adapter=str(folder / "sight" / IMAGE_ADAPTER), shown_share=1.0,
    )  # fmt: skip
    train_mapper(recipe, tmp_path / "run", folder / "align")
    before, after = (
        load_mapper(run / "mapper.safetensors")[0] for run in (folder / "align", tmp_path / "run")
    )
    assert not torch.equal(before.output.weight, after.output.weight)
    name = "adapter_model.safetensors"
    assert (folder / "align" / "adapter" / name).read_bytes() == (
        tmp_path / "run" / "adapter" / name
    ).read_bytes()


def test_a_new_mapper_of_another_shape(trained, tmp_path):
    folder, parts = trained
    recipe = MapperRecipe(
        **parts, mapper="reference", fresh=True, stories=1, captions=1, steps=1, image_weight=0.0
    )
    train_mapper(recipe, tmp_path / "run", folder / "align")
    assert load_mapper(tmp_path / "run" / "mapper.safetensors")[0].config.kind == "reference"


def test_a_mapper_needs_a_loss_from_its_first_step_and_a_folder_of_its_own(trained, tmp_path):
    folder, parts = trained
    recipe = MapperRecipe(**parts, caption_weight=0.0)
    with pytest.raises(BadInputError, match="Set image_weight=1 and image_from=0"):
        train_mapper(recipe, tmp_path / "run", folder / "align")
    with pytest.raises(BadInputError, match="--out and --from are both"):
        train_mapper(replace(recipe, caption_weight=1.0), folder / "align", folder / "align")


def test_a_mapper_needs_an_adapter_to_listen_to(tmp_path):
    with pytest.raises(BadInputError, match="holds no adapter/"):
        train_mapper(MapperRecipe(), tmp_path / "run", tmp_path)


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    folder, parts = trained
    out = tmp_path_factory.mktemp("evaluate")
    run = folder / "align"
    train_caption_adapter(CaptionAdapterRecipe(llm=parts["llm"], stories=4, steps=1), folder / "captions")
    recipe = EvaluateRecipe(
        **parts, adapter=str(run / "adapter"), mapper=str(run / "mapper.safetensors"), stories=2, steps=1, captions=2,
        reference_mapper=str(run / "mapper.safetensors"), caption_adapter=str(folder / "captions" / "adapter"),
    )  # fmt: skip
    evaluate(recipe, out)
    return out


def test_a_report_has_every_row_and_column_with_an_interval_or_nothing(report):
    found = json.loads((report / "report.json").read_text())
    assert tuple(found["rows"]) == ROWS
    for cells in found["rows"].values():
        assert tuple(cells) == COLUMNS
        assert all(cell is None or cell["low"] <= cell["mean"] <= cell["high"] for cell in cells.values())
    assert found["rows"]["two_stage"]["caption_hero"] is None and found["rows"]["oracle"]["fid"] is None
    assert found["rows"]["vokens"]["llm_tokens_per_scene"]["mean"] == 8


def test_rows_that_draw_the_same_differ_in_nothing(report):
    """The reference mapper is given the same file here, so both rows draw the same pictures."""
    cells = json.loads((report / "report.json").read_text())["differences"]["vokens-vokens_reference"]
    same = {name: cells[name]["mean"] for name in ("hero", "prop", "place", "time", "image_similarity")}
    assert same == dict.fromkeys(same, 0.0)


def test_the_page_shows_the_strips_it_names(report):
    page = (report / "report.html").read_text()
    for name in ("true", "vokens", "oracle"):
        strip = f"pictures/{name}/story_000.png"
        assert strip in page and (report / strip).is_file()


def test_a_row_whose_weights_are_missing_is_left_out_and_said(trained, tmp_path, capsys):
    folder, parts = trained
    run = folder / "align"
    recipe = EvaluateRecipe(
        **parts, adapter=str(run / "adapter"), mapper=str(run / "mapper.safetensors"), stories=1, steps=1, captions=1,
        rows=("vokens", "two_stage_caption"), caption_adapter=str(tmp_path / "nothing"),
    )  # fmt: skip
    assert list(evaluate(recipe, tmp_path / "out")["rows"]) == ["vokens"]
    assert "row two_stage_caption is left out" in capsys.readouterr().out


def test_an_unknown_row_is_named():
    with pytest.raises(BadInputError, match="unknown nonsense. Known: vokens"):
        EvaluateRecipe(rows=("nonsense",))


def test_the_shipped_recipe_of_the_benchmark_is_one():
    recipe = load_recipe(EvaluateRecipe, Path("trainer/recipes/storybook_evaluate.toml"), [])
    assert (recipe.stories, recipe.seed, recipe.rows) == (100, 7, ROWS)


def test_the_rivals_adapter_holds_lora_alone(report, trained):
    """Vokens have made the embeddings longer, which PEFT would by itself save whole."""
    names = load_file(trained[0] / "captions" / "adapter" / "adapter_model.safetensors")
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)


def test_a_question_shows_its_picture_first():
    first, second = caption_turns(torch.zeros(1, 2), "a fox")
    assert (first.request, first.text, first.picture) == (LOOK, "", False)
    assert (second.request, second.text, second.picture) == (DESCRIBE, "a fox", False)


def test_a_caption_is_asked_for_where_it_stands_in_training(tiny_llm):
    scenes = next(stories(0))
    whole = story_sequence(tiny_llm, captioned_turns(scenes)).ids
    for index, scene in enumerate(scenes):
        ids = caption_prompt(tiny_llm, captioned_turns(scenes[:index]), scene).ids
        caption = tiny_llm.encode(f"{scene.caption})")
        assert whole[: len(ids) + len(caption)] == ids + caption


def test_a_hero_is_itself_wherever_it_stands_and_no_other():
    state = State("fox", "beach", "day", "apple")
    pictures = [render(state, random.Random(seed)) for seed in range(6)]
    assert min(identity(pictures, "fox", [True] * 6)[1:]) > 0.999
    other = render(state.but(hero="bear"), random.Random(0))
    assert identity([pictures[0], other], "fox", [True, True])[1] < 0.5


def test_a_hero_is_compared_with_its_first_appearance():
    pictures = [render(State("fox", "city", "day"), random.Random(seed)) for seed in range(3)]
    found = identity(pictures, "fox", [False, True, True])
    assert np.isnan(found[0]) and np.isnan(found[1]) and found[2] > 0.99


def test_a_changed_fact_is_one_fact_and_never_a_held_out_combination():
    draw = random.Random(3)
    for _ in range(300):
        state = training_state(draw)
        changed = change_a_fact(state, draw)
        assert sum(a != b for a, b in zip(astuple(state), astuple(changed), strict=True)) == 1
        assert not held_out(changed)


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


def test_ablations_train_and_measure_each_variant_once(trained, tmp_path, monkeypatch):
    _, parts = trained
    recipe = tmp_path / "recipe.toml"
    paths = "".join(f'{name} = "{value}"\n' for name, value in parts.items())
    text = ABLATIONS
    for table in ("[align]", "[finetune]", "[evaluate]"):
        text = text.replace(table, f"{table}\n{paths}")
    recipe.write_text(text)
    table = run_ablations(recipe, tmp_path / "out")
    assert list(table) == ["default", "no stage 2"]
    assert not (tmp_path / "out" / "no stage 2" / "finetune").exists()
    assert (tmp_path / "out" / "ablations.md").read_text().count("\n") == 4
    monkeypatch.setattr(ablate, "evaluate", lambda *given: pytest.fail("measured again"))
    assert run_ablations(recipe, tmp_path / "out") == table


@pytest.mark.parametrize(
    "text", ["[variants]", "[alinn]\nsteps = 1\n[variants.a]", "[variants.a]\nalinn = {}", "["]
)
def test_a_recipe_of_ablations_that_says_nothing_or_too_much_is_refused(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(BadInputError, match="recipe.toml"):
        read_variants(tmp_path / "recipe.toml")


def test_the_shipped_ablations_are_recipes():
    variants = read_variants(Path("trainer/recipes/storybook_ablations.toml"))
    assert variants["2 vokens"].align.vokens == 2 and variants["default"].align.steps == 200
    assert variants["no stage 2"].finetune is None
