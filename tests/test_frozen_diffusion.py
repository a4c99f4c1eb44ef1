"""Text-to-image models of other kinds in training: SDXL's second text encoder, and models that predict velocity."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import ImageChops
from safetensors.torch import load_file

from minigpt5_core import conditioning
from minigpt5_core.conditioning import Conditioning
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import diffusion_loss
from tests.stages import train_align, train_finetune, values_of
from tests.toy_diffusion import SPACES, XL_POOLED, XL_WIDTHS, refusing, save
from trainer.cli import main
from trainer.common.recipe import change_recipe, make_recipe
from trainer.diffusion import TextTargets, load_frozen_diffusion
from trainer.diffusion.unet import Sd
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe
from trainer.storybook.models.diffusion_model import encode_texts
from trainer.storybook.world.export import export_stories

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    save("sdxl", folder)
    return folder


@pytest.fixture
def toy_space(monkeypatch):
    monkeypatch.setitem(conditioning.SPACES, "toy_xl", SPACES["sdxl"])
    return "toy_xl"


@pytest.fixture
def recipe(tiny_llm_folder, xl_folder, toy_space, tmp_path):
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(xl_folder), space=toy_space, steps=3, batch=2, image_from=0.0,
        preview_every=3, save_every=100, tracker="", data=str(export_stories("jsonl", 2, 3, tmp_path / "data")),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.space("sdxl", "train")
def test_both_stages_train_tokens_and_the_pooled_vector_for_sdxl(recipe, tmp_path):
    train_align(recipe, tmp_path / "align")
    assert (tmp_path / "align" / "preview_000003.png").is_file()
    named = values_of(recipe, "llm", "diffusion", "space", "data", "tracker")
    train_finetune(
        make_recipe(FinetuneRecipe, **named, steps=2, batch=1, image_from=0.0),
        tmp_path / "told",
        tmp_path / "align",
    )
    one, other = (load_file(tmp_path / run / "mapper.safetensors") for run in ("align", "told"))
    assert one["pooled_head.weight"].shape[0] == XL_POOLED
    assert not torch.equal(one["pooled_head.weight"], other["pooled_head.weight"])
    mapper, header = load_mapper(tmp_path / "told" / "mapper.safetensors")
    assert mapper(torch.zeros(1, 8, header.llm_width)).pooled.shape == (1, XL_POOLED)


@pytest.mark.slow
@pytest.mark.space("sdxl", "train")
def test_a_cache_has_both_answers_of_sdxl_and_gives_the_same_losses(recipe, tmp_path, xl_folder):
    train_align(recipe, tmp_path / "pixels")
    given = ["--format", "jsonl", "--out", str(tmp_path / "cache"), "--diffusion", str(xl_folder)]
    assert main(["data", "cache", recipe.data.path, *given]) == 0
    cached = change_recipe(recipe, cache=str(tmp_path / "cache"))
    train_align(cached, tmp_path / "cached", load_diffusion=refusing)
    runs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("pixels", "cached")]
    assert len(runs[0]) == 3
    for pixels, cached in zip(*runs, strict=True):
        assert json.loads(cached) == pytest.approx(json.loads(pixels), rel=1e-5)


def test_the_model_answers_what_its_pipeline_would_ask(xl_folder, tiny_diffusion_folder):
    plain = load_frozen_diffusion(tiny_diffusion_folder)
    answer = plain.encode(["a fox", ""])
    assert torch.equal(answer.tokens, encode_texts(plain.pipeline, ["a fox", ""])) and answer.pooled is None
    large = load_frozen_diffusion(xl_folder)
    answer = large.encode(["a fox", ""])
    assert answer.tokens.shape == (2, 77, sum(XL_WIDTHS)) and answer.pooled.shape == (2, XL_POOLED)
    ids = large.pipeline.tokenizer(["a fox", ""], padding="max_length", return_tensors="pt").input_ids
    both = [part(ids, output_hidden_states=True).hidden_states[-2] for part in
            (large.pipeline.text_encoder, large.pipeline.text_encoder_2)]  # fmt: skip
    assert torch.allclose(answer.tokens, torch.cat(both, -1), atol=1e-6)
    assert torch.allclose(answer.pooled, large.pipeline.text_encoder_2(ids).text_embeds, atol=1e-6)
    assert all(not p.requires_grad for p in large.pipeline.text_encoder_2.parameters())


def test_pooled_vectors_count_beside_tokens(xl_folder):
    targets = TextTargets(load_frozen_diffusion(xl_folder), ["a fox", "a bear", "a cat in the snow"])
    wanted = targets.diffusion.encode(["a fox"])
    assert targets.loss(wanted, ["a fox"], standardised=False).item() == 0
    moved = Conditioning(wanted.tokens + 1, wanted.pooled + 2)
    assert targets.loss(moved, ["a fox"], standardised=False).item() == pytest.approx(1 + 4, rel=1e-5)


@pytest.fixture
def predicting(tiny_diffusion_folder, tmp_path):
    """predicting("v_prediction"): the folder of a model of SD's kind that is said to predict that."""

    def change(kind):
        folder = shutil.copytree(tiny_diffusion_folder, tmp_path / kind)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
        return folder

    return change


def of_sd(check):
    """Runs a test for noise and for velocity, which SD 2.1 predicts in one of its sizes."""
    spaces = {"epsilon": ("sd15", "sd21", "storybook"), "v_prediction": ("sd21",)}
    values = [
        pytest.param(kind, marks=[pytest.mark.space(name, check) for name in names])
        for kind, names in spaces.items()
    ]
    return pytest.mark.parametrize("kind", values)


@pytest.mark.slow
@of_sd("train")
def test_models_of_sds_kind_train_and_stay_as_they_were(recipe, predicting, kind, tmp_path):
    found = []

    def load(*given):
        found.append(load_frozen_diffusion(*given))
        return found[0]

    folder = predicting(kind)
    changed = change_recipe(recipe, diffusion=str(folder), space="storybook", steps=2)
    train_align(changed, tmp_path / "align", load_diffusion=load)
    assert len((tmp_path / "align" / "metrics.jsonl").read_text().splitlines()) == 2
    assert found[0].velocity == (kind == "v_prediction")
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (folder / name).glob("*.safetensors")
        weights, kept = getattr(found[0].pipeline, name).state_dict(), load_file(file)
        assert all(torch.equal(weights[key], kept[key]) for key in kept)


def assert_target_draws_as_caption(diffusion):
    drawn = diffusion.generate(diffusion.encode(["a fox"]), diffusion.encode([""]), seed=3)[0]
    generator = torch.Generator().manual_seed(3)
    expected = diffusion.pipeline(
        "a fox", negative_prompt="", num_inference_steps=15, guidance_scale=3.0, generator=generator
    ).images[0]
    assert drawn.size == (diffusion.side,) * 2
    assert max(high for _, high in ImageChops.difference(drawn, expected).getextrema()) <= 1


@of_sd("diffusers")
def test_a_target_draws_what_its_caption_draws(predicting, kind):
    assert_target_draws_as_caption(load_frozen_diffusion(predicting(kind)))


@pytest.mark.space("sdxl", "diffusers")
def test_sdxls_target_draws_what_its_caption_draws(xl_folder):
    assert_target_draws_as_caption(load_frozen_diffusion(xl_folder))


def test_velocity_is_weighed_so_that_it_counts_as_the_noise_it_implies(tiny_diffusion_folder):
    torch.manual_seed(0)
    clean, noise, velocity = (torch.randn(3, 4, 2, 2) for _ in range(3))
    alpha = torch.tensor([0.9, 0.5, 0.05])
    signal, rest = (x.sqrt()[:, None, None, None] for x in (alpha, 1 - alpha))
    implied = rest * (signal * clean + rest * noise) + signal * velocity  # the noise that velocity stands for
    snr = alpha / (1 - alpha)
    as_noise = diffusion_loss(implied, noise, snr)
    as_velocity = diffusion_loss(velocity, signal * noise - rest * clean, snr, velocity=True)
    assert as_noise.item() == pytest.approx(as_velocity.item(), rel=1e-5)


def test_a_model_that_predicts_velocity_is_asked_for_it(tiny_diffusion_folder):
    diffusion = load_frozen_diffusion(tiny_diffusion_folder)
    diffusion.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    diffusion = Sd(diffusion.pipeline)
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    steps, answer = torch.tensor([10, 900]), diffusion.encode(["a fox", "a bear"])
    with torch.no_grad():
        found = diffusion.loss(answer, latents, noise, steps, 5.0)
        alpha = diffusion.noise.alphas_cumprod[steps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        errors = (
            (diffusion.pipeline.unet(noisy, steps, answer.tokens).sample - velocity).square().mean((1, 2, 3))
        )
    snr = (alpha / (1 - alpha)).flatten()
    assert found.item() == pytest.approx((errors * snr.clamp(max=5) / (snr + 1)).mean().item(), rel=1e-4)


def test_a_model_of_another_kind_is_refused(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), **blocks)
    DDIMPipeline(unet, EulerDiscreteScheduler()).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match="holds a DDIMPipeline; mappers are trained for StableDiffusion"):
        load_frozen_diffusion(tmp_path)
