"""Every stage on data without pictures: no denoiser and no VAE is read, and captions alone teach the mapper."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import trainer.training.pictures as pictures
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.errors import BadInputError
from tests.stages import train_align, train_finetune, train_mapper
from trainer.cli import main
from trainer.common.recipe import change_recipe, make_recipe
from trainer.data.source import PictureTarget
from trainer.diffusion import TextTargets, load_frozen_diffusion, load_text_encoders
from trainer.evaluation.evaluate import EvaluateRecipe, evaluate
from trainer.feature_cache.cache import CachedFeatures
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe
from trainer.stages.mapper import MapperRecipe
from trainer.storybook.world.export import export_stories
from trainer.training.config import LossConfig, Unasked
from trainer.training.picture_losses import PictureLosses

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.trains]


@pytest.fixture
def encoders(tiny_diffusion_folder, tmp_path):
    """The text encoder and the tokenizer of the tiny model, and nothing else: no index either."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_diffusion_folder / name, tmp_path / "encoders" / name)
    return tmp_path / "encoders"


@pytest.fixture
def parts(tiny_llm_folder, encoders):
    return {
        "llm": str(tiny_llm_folder), "diffusion": str(encoders), "steps": 3, "batch": 2, "image_from": 0.0,
        "preview_every": 2, "save_every": 2, "tracker": "",
    }  # fmt: skip


@pytest.fixture
def told(tmp_path):
    return {"data": str(export_stories("jsonl", 3, 5, tmp_path / "told", captions_only=True))}


@pytest.fixture
def captions(tmp_path):
    return {"data": str(export_stories("captions", 3, 5, tmp_path / "captions")), "format": "captions"}


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_stage_trains_on_captions_and_described_stories(parts, told, captions, tmp_path, capsys):
    train_align(make_recipe(AlignRecipe, **parts, **captions), tmp_path / "align")
    said = capsys.readouterr().out
    assert said.count("trained on captions alone") == 1 and "there are no previews" in said
    train_finetune(make_recipe(FinetuneRecipe, **parts, **told), tmp_path / "fine", tmp_path / "align")
    train_mapper(make_recipe(MapperRecipe, **parts, **told, stories=2), tmp_path / "alone", tmp_path / "fine")
    assert [set(line) for line in losses(tmp_path / "align")] == [{"step", "text", "caption"}] * 3
    assert [set(line) for line in losses(tmp_path / "fine")] == [{"step", "text", "caption"}] * 3
    assert [set(line) for line in losses(tmp_path / "alone")] == [{"step", "caption"}] * 3
    assert not list(tmp_path.rglob("preview_*")) and (tmp_path / "alone" / "mapper.safetensors").is_file()
    assert json.loads((tmp_path / "fine" / "run.json").read_text())["recipe"]["loss"]["image_weight"] == 0.0


@pytest.mark.slow
def test_the_whole_models_text_encoder_teaches_the_same(parts, told, tiny_diffusion_folder, tmp_path):
    """And with pictures at hand, but without the diffusion loss, the losses are the same too."""
    drawn = {"data": str(export_stories("jsonl", 3, 5, tmp_path / "drawn"))}
    whole = {**parts, "diffusion": str(tiny_diffusion_folder)}
    runs = {"text": parts | told, "whole": whole | told, "pictures": whole | drawn | {"image_weight": 0.0}}
    for name, values in runs.items():
        train_finetune(make_recipe(FinetuneRecipe, **values), tmp_path / name)
    weights = [load_file(tmp_path / name / "mapper.safetensors") for name in runs]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)
    assert losses(tmp_path / "text") == losses(tmp_path / "whole") == losses(tmp_path / "pictures")


def test_neither_denoiser_nor_vae_is_read_where_there_are_no_pictures(
    parts, captions, tiny_diffusion_folder, tmp_path
):
    shutil.copytree(tiny_diffusion_folder, tmp_path / "whole")
    for weights in [*tmp_path.glob("whole/unet/*.safetensors"), *tmp_path.glob("whole/vae/*.safetensors")]:
        weights.write_bytes(b"not to be read")
    recipe = make_recipe(
        AlignRecipe, **{**parts, "diffusion": str(tmp_path / "whole"), "steps": 1}, **captions
    )
    train_align(recipe, tmp_path / "align")
    with pytest.raises(BadInputError, match="is not a whole safetensors file"):
        load_frozen_diffusion(tmp_path / "whole")


def test_a_recipe_that_asks_for_the_diffusion_loss_is_refused(parts, captions, tmp_path):
    recipe = make_recipe(AlignRecipe, **parts, **captions)
    for weight in (1, 0.5):
        with pytest.raises(
            BadInputError, match=r"no denoiser or VAE to learn from, but image_weight=.* asks for the"
        ):
            train_align(change_recipe(recipe, image_weight=weight), tmp_path / "align")
    with pytest.raises(BadInputError, match="caption_weight is 0: nothing would teach the mapper"):
        train_align(change_recipe(recipe, caption_weight=0), tmp_path / "align")
    whole = change_recipe(recipe, diffusion="storybook/diffusers", image_weight=1)
    with pytest.raises(BadInputError, match=r"captions\.txt holds no pictures, but image_weight=1 asks"):
        train_align(whole, tmp_path / "align")
    assert not (tmp_path / "align").exists()


def test_a_weight_that_nobody_asked_for_is_told_from_one_that_is_as_large():
    recipe = make_recipe(AlignRecipe)
    assert isinstance(recipe.loss.image_weight, Unasked) and recipe.loss == LossConfig(image_weight=1.0)
    assert isinstance(change_recipe(recipe, steps=3).loss.image_weight, Unasked)
    assert not isinstance(change_recipe(recipe, image_weight=1.0).loss.image_weight, Unasked)
    late = make_recipe(
        AlignRecipe, image_weight=1.0, image_from=1.0, diffusion="gone", data="x.txt", format="captions"
    )
    assert not late.uses_diffusion_loss(late.optim.steps)


def test_a_recipe_with_pictures_stays_as_it_is():
    recipe = make_recipe(AlignRecipe)
    assert pictures.as_pictures_allow(recipe, load_frozen_diffusion) == (recipe, load_frozen_diffusion)


def test_of_both_kinds_of_pictures_the_diffusion_loss_is_over_those_at_hand(tiny_llm, tiny_diffusion_folder):
    diffusion = load_frozen_diffusion(tiny_diffusion_folder)
    targets = TextTargets(diffusion, ["a fox", "a bear", "a cat"])
    recipe = make_recipe(AlignRecipe, dropout=0.0)
    space = targets.space(pictures_space())
    torch.manual_seed(0)
    mapper = build_mapper(compact_config(space, tiny_llm.width))
    found = PictureLosses(recipe, mapper, targets)
    red, blue = (lambda own, colour=colour: Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    drawn = [PictureTarget("a fox", red, 1), PictureTarget("a cat", blue, 3)]
    mixed = [drawn[0], PictureTarget("a bear", None, 2), drawn[1]]
    states = torch.randn(3, 8, tiny_llm.width)
    both, at_hand = found(states, mixed, True), found(states[[0, 2]], drawn, True)
    assert both["image"].item() == pytest.approx(at_hand["image"].item(), rel=1e-5)
    assert found.counts(mixed, True) == {"caption": 3, "image": 2} and found.counts(mixed, False) == {
        "caption": 3
    }
    assert (
        set(found(states[:1], mixed[1:2], True)) == {"caption"}
        and found.counts(mixed[1:2], True)["image"] == 0
    )


def pictures_space():
    from minigpt5_core.conditioning import SPACES

    return SPACES["storybook"]


@pytest.mark.slow
def test_mixed_stories_train_with_both_losses(parts, tiny_diffusion_folder, tmp_path):
    folder = tmp_path / "mixed"
    path = export_stories("jsonl", 3, 5, folder)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for story in lines:  # of every story the first picture stays
        for item in [item for item in story["items"] if "picture" in item][1:]:
            del item["picture"]
    path.write_text("\n".join(map(json.dumps, lines)))
    recipe = make_recipe(FinetuneRecipe, **{**parts, "diffusion": str(tiny_diffusion_folder)}, data=str(path))
    train_finetune(recipe, tmp_path / "run")
    assert [set(line) for line in losses(tmp_path / "run")] == [{"step", "text", "caption", "image"}] * 3
    assert (tmp_path / "run" / "preview_000002.png").is_file()


def test_another_space_is_refused_by_what_the_text_encoders_answer(parts, captions, tmp_path):
    recipe = make_recipe(AlignRecipe, **parts, **captions, space="sd15")
    with pytest.raises(
        BadInputError, match=r"answers in the space sd15 \(77 x 768\), but .* storybook \(77 x 128\)"
    ):
        train_align(recipe, tmp_path / "align")


def test_stories_whose_pictures_nothing_is_said_of_are_refused(parts, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"items": [{"text": "Mia."}]}\n')
    recipe = make_recipe(AlignRecipe, **parts, data=str(tmp_path / "a.jsonl"))
    with pytest.raises(BadInputError, match="a.jsonl says of no picture what it shows"):
        train_align(recipe, tmp_path / "align")


def test_a_cache_of_captions_serves_trainings_with_and_without_pictures(
    told, encoders, tiny_diffusion_folder, tmp_path, capsys
):
    given = [
        "data",
        "cache",
        told["data"],
        "--format",
        "jsonl",
        "--out",
        str(tmp_path / "cache"),
        "--diffusion",
    ]
    assert main([*given, str(tiny_diffusion_folder)]) == 0
    assert main([*given, str(encoders)]) == 0
    out = capsys.readouterr().out
    assert "0 pictures and" in out and "0 features computed" in out and "Nothing here" not in out
    for diffusion in (load_frozen_diffusion(tiny_diffusion_folder), load_text_encoders(encoders)):
        features = CachedFeatures(tmp_path / "cache", diffusion)
        assert torch.equal(features.target("").tokens, diffusion.encode([""]).tokens[0])


def test_the_command_trains_on_captions(parts, captions, tmp_path, capsys):
    changes = [f"--set={name}={value}" for name, value in (parts | captions).items()]
    assert main(["align", "--out", str(tmp_path / "run"), *changes]) == 0
    assert main(["align", "--out", str(tmp_path / "run"), *changes, "--set", "image_weight=1"]) == 2
    assert "Set image_weight=0 (the captions teach the mapper)" in capsys.readouterr().err


@pytest.mark.slow
def test_described_stories_are_evaluated_without_true_pictures(trained, told, tmp_path, capsys):
    folder, parts = trained
    run = folder / "align"
    recipe = EvaluateRecipe(
        **parts, **told, stories=1, steps=1, write=False, systems=("vokens", "oracle"),
        adapter=str(run / "adapter"), mapper=str(run / "mapper.safetensors"),
    )  # fmt: skip
    report = evaluate(recipe, tmp_path / "report")
    assert "there are no scores that compare with true pictures" in capsys.readouterr().out
    assert report["rows"]["vokens"]["abstained"]["mean"] == 0 and report["rows"]["vokens"]["spurious"] is None
    assert report["rows"]["vokens"]["clip_i"] is None


def test_captions_are_no_stories_to_go_on_with(captions, tmp_path):
    with pytest.raises(BadInputError, match="holds captions, and no story to go on with. Set write=false"):
        evaluate(EvaluateRecipe(**captions), tmp_path / "report")
