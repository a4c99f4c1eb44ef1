"""The diffusion model in bf16, and pictures of another size: against float32, and against the models' own rules."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from minigpt5_core import conditioning
from minigpt5_core.conditioning import Conditioning
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story import Story
from tests.stages import train_align
from tests.toy_diffusion import SPACES, load, save
from trainer.cli import main
from trainer.common.images import center_crop, grid
from trainer.common.recipe import change_recipe, make_recipe
from trainer.data.formats import read
from trainer.evaluation.evaluate import EvaluateRecipe, evaluate
from trainer.feature_cache.cache import CachedFeatures
from trainer.stages.align import AlignRecipe
from trainer.storybook.benchmark.evaluate import StorybookEvaluateRecipe, evaluate_storybook
from trainer.storybook.world.export import export_stories

pytestmark = pytest.mark.filterwarnings("ignore")
PICTURES = 8  # in a preview
FAMILIES = ("sd3", "flux", "sdxl", "storybook")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_diffusion_folder):
    made = {"storybook": tiny_diffusion_folder}
    for name in ("sd3", "flux", "sdxl"):
        made[name] = tmp_path_factory.mktemp(name)
        save(name, made[name])
    return made


@pytest.fixture
def recipe(folders, tiny_llm_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(conditioning.SPACES, "toy_sd3", SPACES["sd3"])
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(folders["sd3"]), space="toy_sd3", tokens=154, steps=3, batch=2,
        image_from=0.0, preview_every=3, save_every=100, tracker="",
        data=str(export_stories("jsonl", 2, 3, tmp_path / "data")),
    )  # fmt: skip


def noise_picture(side):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def modules(diffusion):
    return [part for part in diffusion.pipeline.components.values() if isinstance(part, torch.nn.Module)]


# bf16, which rounds by up to 1 in 256


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_losses_and_gradients_are_those_of_float32_to_its_rounding(folders, family):
    whole, half = load(folders[family]), load(folders[family], "bf16")
    assert {p.dtype for part in modules(half) for p in part.parameters()} == {torch.bfloat16}
    answer = whole.encode(["a fox", "a bear"])
    latents = whole.latents([noise_picture(whole.side)] * 2)
    noise, times = (
        torch.randn_like(latents),
        whole.timesteps([torch.Generator().manual_seed(s) for s in (1, 2)]),
    )
    found = []
    for diffusion in (whole, half):
        tokens = answer.tokens.clone().requires_grad_()
        loss = diffusion.loss(Conditioning(tokens, answer.pooled), latents, noise, times, 5.0)
        loss.backward()
        assert loss.dtype == tokens.grad.dtype == torch.float32
        found.append((loss.item(), tokens.grad.flatten()))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02) and found[1][0] != found[0][0]
    assert cosine_similarity(found[0][1], found[1][1], 0) > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_latents_and_targets_are_those_of_float32_to_its_rounding(folders, family):
    whole, half = load(folders[family]), load(folders[family], "bf16")
    picture = noise_picture(whole.side)
    pairs = [(whole.latents([picture]), half.latents([picture]))]
    assert pairs[0][1].dtype == torch.float32
    one, other = whole.encode(["a fox"]), half.encode(["a fox"])
    pairs += [(one.tokens, other.tokens)] + ([(one.pooled, other.pooled)] if half.pools else [])
    for expected, found in pairs:
        assert 0 < (found.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_a_story_has_the_same_pictures_to_its_rounding(folders, family, tiny_llm):
    drawn = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        pipeline = load_diffusion(folders[family], precision=precision)
        pipeline.default_sample_size = 8  # Flux's would be 128, whatever its size
        space = conditioning.SPACES["storybook"] if family == "storybook" else SPACES[family]
        mapper = build_mapper(compact_config(space, tiny_llm.width)).eval()
        told = StoryTeller(tiny_llm, mapper, pipeline).tell(Story("Mia.", seed=4), scenes=1, steps=2)
        drawn.append(np.asarray(next(told).picture, float))
    assert 0 < np.abs(drawn[0] - drawn[1]).max() and np.abs(drawn[0] - drawn[1]).mean() < 4


@pytest.mark.slow
def test_training_in_bf16_gives_the_losses_of_float32_to_its_rounding(recipe, tmp_path):
    recipe = change_recipe(recipe, steps=2, preview_every=100)
    train_align(recipe, tmp_path / "whole")
    train_align(change_recipe(recipe, diffusion_precision="bf16"), tmp_path / "half")
    assert losses(tmp_path / "half") != losses(tmp_path / "whole")
    for half, whole in zip(losses(tmp_path / "half"), losses(tmp_path / "whole"), strict=True):
        assert half == pytest.approx(whole, rel=0.03)
    weights = load_file(tmp_path / "half" / "mapper.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_cache_has_answers_for_trainings_of_its_precision_and_size_alone(folders, tmp_path):
    data, folder = export_stories("jsonl", 1, 3, tmp_path / "data"), folders["sd3"]
    given = ["--format", "jsonl", "--out", str(tmp_path / "cache"), "--diffusion", str(folder)]
    chosen = ["--diffusion-precision", "bf16", "--picture-size", "8"]
    assert main(["data", "cache", str(data), *given, *chosen]) == 0
    scene = next(scene for record in read(data, "jsonl") for scene in record.scenes if scene.picture)
    half = load(folder, "bf16", 8)
    kept = CachedFeatures(tmp_path / "cache", half)
    asked, latents = half.encode([scene.caption]), half.latents([center_crop(scene.picture.open(), 8)])
    assert torch.equal(kept.target(scene.caption).tokens, asked.tokens[0])
    assert torch.equal(kept.latents(scene.picture), latents[0])
    assert (kept.target(scene.caption).tokens.dtype, latents.shape) == (torch.bfloat16, (1, 16, 4, 4))
    whole = CachedFeatures(tmp_path / "cache", load(folder, "float32", 8))
    assert whole.target(scene.caption) is None and whole.latents(scene.picture) is None
    larger = CachedFeatures(tmp_path / "cache", load(folder, "bf16", 16))
    assert larger.target(scene.caption) is not None and larger.latents(scene.picture) is None


def test_another_precision_is_refused(folders):
    with pytest.raises(BadInputError, match="diffusion_precision is 'fp16'; it can be float32 or bf16"):
        make_recipe(AlignRecipe, diffusion_precision="fp16")
    with pytest.raises(BadInputError, match="diffusion_precision is 'fp16'; it can be float32 or bf16"):
        EvaluateRecipe(diffusion_precision="fp16")
    with pytest.raises(BadInputError, match="diffusion_precision is 'fp16'; it can be float32 or bf16"):
        load_diffusion(folders["sd3"], precision="fp16")


# Size


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_losses_and_pictures_follow_the_size(folders, family):
    own = load(folders[family])
    # SD3's places end, the storybook's pictures take long
    side = {"sd3": 12, "flux": 24, "sdxl": 24, "storybook": 64}[family]
    assert side != own.side
    diffusion = load(folders[family], picture_size=side)
    latents = diffusion.latents([noise_picture(side)])
    assert latents.shape[2:] == (side // diffusion.pipeline.vae_scale_factor,) * 2
    answer, times = diffusion.encode(["a fox"]), diffusion.timesteps([torch.Generator().manual_seed(1)])
    assert diffusion.loss(answer, latents, torch.randn_like(latents), times, 5.0).isfinite()
    assert diffusion.generate(answer, diffusion.encode([""]))[0].size == (side, side)


@pytest.mark.slow
def test_a_training_is_shown_and_previews_pictures_of_the_recipes_size(recipe, tmp_path):
    seen = []

    def load_watched(*given):
        diffusion = load(*given)
        loss = diffusion.loss
        diffusion.loss = lambda answer, latents, *rest: (
            seen.append(latents.shape) or loss(answer, latents, *rest)
        )
        return diffusion

    small = change_recipe(recipe, steps=1, preview_every=1, picture_size=12)
    train_align(small, tmp_path / "run", load_diffusion=load_watched)
    assert set(seen) == {(2, 16, 6, 6)}
    one = Image.new("RGB", (12, 12))
    assert Image.open(tmp_path / "run" / "preview_000001.png").size == grid([one] * PICTURES, 4).size


def test_noise_is_shifted_and_sdxl_told_by_the_size(folders):
    flux = load(folders["flux"], picture_size=32)
    flux.pipeline.scheduler.register_to_config(base_image_seq_len=4, max_image_seq_len=124)
    assert flux.shift() == pytest.approx(0.5 + 0.65 * (8 * 8 - 4) / 120)  # 8 x 8 patches of 4 pixels
    xl = load(folders["sdxl"], "bf16", 264)
    sizes = xl.added_inputs(xl.encode(["a fox"]))["added_cond_kwargs"]["time_ids"]
    assert sizes.tolist() == [[264, 264, 0, 0, 264, 264]]


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("sd3", 10, r"size is 10, but StableDiffusion3Pipeline takes multiples of 4 .* picture_size=8 or 12, or 0"),
        ("sd3", 36, "has places for at most 32 pixels. Set picture_size=32 or less"),  # 8 patches of 2 x 2 latents
        ("flux", 18, "FluxPipeline takes multiples of 4 pixels. Set picture_size=16 or 20, or 0"),
        ("flux", 2, "Set picture_size=4 or 8, or 0"),
        ("sdxl", 12, "StableDiffusionXLPipeline takes multiples of 8 pixels. Set picture_size=8 or 16"),
        ("storybook", -8, "picture_size is -8, .* Set picture_size=8 or 16"),
    ],
)  # fmt: skip
def test_a_size_that_the_model_cannot_take_is_refused(folders, family, size, message):
    with pytest.raises(BadInputError, match=message):
        load(folders[family], picture_size=size)


@pytest.mark.parametrize(("family", "size"), [("sd3", 32), ("sd3", 4), ("flux", 20), ("storybook", 24)])
def test_the_sizes_that_are_proposed_instead_can_be_taken(folders, family, size):
    diffusion = load(folders[family], picture_size=size)
    answer = diffusion.encode(["a fox"])
    latents = diffusion.latents([noise_picture(size)])
    with torch.no_grad():
        times = diffusion.timesteps([torch.Generator().manual_seed(1)])
        assert diffusion.loss(answer, latents, torch.randn_like(latents), times, 5.0).isfinite()


@pytest.fixture
def parts(trained):
    folder, parts = trained
    run = folder / "align"
    return parts | {"adapter": str(run / "adapter"), "mapper": str(run / "mapper.safetensors")}


@pytest.mark.slow
def test_an_evaluation_draws_in_the_precision_that_was_asked_for(parts, tmp_path):
    recipe = StorybookEvaluateRecipe(**parts, stories=1, steps=1, captions=1, systems=("vokens",))
    drawn = []
    for precision in ("float32", "bf16"):  # in the same folder, where what was drawn in another is not taken
        evaluate_storybook(replace(recipe, diffusion_precision=precision), tmp_path)
        files = sorted((tmp_path / "pictures" / "vokens").rglob("*.png"))
        drawn.append([np.asarray(Image.open(file), float) for file in files])
    assert 0 < np.abs(drawn[0][1] - drawn[1][1]).mean() < 8


@pytest.mark.slow
def test_an_evaluation_on_data_draws_pictures_of_the_size_that_was_asked_for(parts, tmp_path):
    data = str(export_stories("jsonl", 1, 4, tmp_path / "data"))
    recipe = EvaluateRecipe(
        **parts, stories=1, steps=1, data=data, write=False, systems=("vokens", "oracle"), picture_size=64
    )
    evaluate(recipe, tmp_path / "out")
    files = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    assert {file.parents[1].name for file in files} == {"vokens", "oracle", "true"}
    assert {Image.open(file).height for file in files} == {64}
    with pytest.raises(BadInputError, match="picture_size is 60, .* multiples of 8"):
        evaluate(change_recipe(recipe, picture_size=60), tmp_path / "out")
    with pytest.raises(BadInputError, match="picture_size is 64, but data is not set"):
        StorybookEvaluateRecipe(picture_size=64)
