"""SD3 and Flux in training and drawing, on diffusers' own classes at toy size: targets, times and losses by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from minigpt5_core import conditioning
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.diffusion import load_diffusion, prompt_arguments, space_of
from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import flow_loss
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story import Story
from tests import toy_diffusion
from tests.stages import train_align, train_finetune, values_of
from tests.toy_diffusion import WIDTH, load, refusing, save
from trainer.cli import main
from trainer.common.recipe import change_recipe, make_recipe
from trainer.diffusion import TextTargets
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe
from trainer.storybook.world.export import export_stories
from trainer.training.build_mapper import new_mapper

pytestmark = pytest.mark.filterwarnings("ignore")
SPACES = {name: toy_diffusion.SPACES[name] for name in ("sd3", "flux")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("sd3", "flux", "schnell"):
        made[name] = tmp_path_factory.mktemp(name)
        save(name, made[name])
    return made


@pytest.fixture
def family(request):
    return request.param


def every_family(check):
    """Runs a test for each family, and counts it for that check in the table of spaces."""
    values = [pytest.param(name, marks=pytest.mark.space(name, check)) for name in SPACES]
    return pytest.mark.parametrize("family", values, indirect=True)


@pytest.fixture
def folder(folders, family, monkeypatch):
    monkeypatch.setitem(conditioning.SPACES, SPACES[family].name, SPACES[family])
    return folders[family]


@pytest.fixture
def recipe(folder, family, tiny_llm_folder, tmp_path):
    space = SPACES[family]
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(folder), space=space.name, tokens=space.tokens, steps=3, batch=2,
        image_from=0.0, preview_every=3, save_every=100, tracker="",
        data=str(export_stories("jsonl", 2, 3, tmp_path / "data")),
    )  # fmt: skip


class Watched:
    """Loads diffusion models, and keeps each with its weights as they were."""

    def __init__(self):
        self.found = []

    def __call__(self, *given):
        diffusion = load(*given)
        parts = [part for part in diffusion.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        self.found.append((parts, [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]))
        return diffusion


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def by_hand(family, pipeline, noisy, sigma, answer):
    """The velocity of one sample, (1, 16, h, w)."""
    if family == "flux":
        return flux_by_hand(pipeline, noisy, sigma, answer)
    return pipeline.transformer(
        hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=answer.tokens,
        pooled_projections=answer.pooled, return_dict=False,
    )[0]  # fmt: skip


def flux_by_hand(pipeline, noisy, sigma, answer):
    """Each patch of 2 x 2 is a token of 64 numbers, channel by channel, and knows its row and column."""
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    places = [(row, column) for row in range(rows) for column in range(columns)]
    patches = [noisy[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for row, column in places]
    guidance = torch.ones(1) if pipeline.transformer.config.guidance_embeds else None
    packed = pipeline.transformer(
        hidden_states=torch.stack([patch.flatten() for patch in patches])[None], timestep=sigma, guidance=guidance,
        encoder_hidden_states=answer.tokens, pooled_projections=answer.pooled, txt_ids=torch.zeros(256, 3),
        img_ids=torch.tensor([[0.0, row, column] for row, column in places]), return_dict=False,
    )[0]  # fmt: skip
    found = torch.zeros_like(noisy)
    for (row, column), patch in zip(places, packed[0], strict=True):
        found[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.view(-1, 2, 2)
    return found


# Training


@every_family("train")
@pytest.mark.slow
def test_both_stages_train_the_mapper_and_leave_the_model_as_it_was(recipe, family, tmp_path):
    watched = Watched()
    train_align(recipe, tmp_path / "align", load_diffusion=watched)
    assert (tmp_path / "align" / "preview_000003.png").is_file()
    assert len(losses(tmp_path / "align")) == 3
    ((parts, before),) = watched.found
    for part, weights in zip(parts, before, strict=True):
        assert all(torch.equal(weights[name], now) for name, now in part.state_dict().items())
        assert not any(parameter.requires_grad for parameter in part.parameters())
    named = values_of(recipe, "llm", "diffusion", "space", "tokens", "data", "tracker")
    AcceleratorState._reset_state(reset_partial_state=True)  # it takes a process's first precision for good
    half = {"precision": "bf16", "llm_precision": "bf16", "gradient_checkpointing": True}
    train_finetune(
        make_recipe(FinetuneRecipe, **named, **half, steps=2, batch=1, image_from=0.0),
        tmp_path / "told",
        tmp_path / "align",
        load_diffusion=load,
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    one, other = (load_file(tmp_path / run / "mapper.safetensors") for run in ("align", "told"))
    assert all(
        not torch.equal(one[f"{name}.weight"], other[f"{name}.weight"]) for name in ("output", "pooled_head")
    )
    mapper, header = load_mapper(tmp_path / "told" / "mapper.safetensors")
    answer = mapper(torch.zeros(1, 8, header.llm_width))
    space = SPACES[family]
    assert answer.tokens.shape == (1, space.tokens, WIDTH) and answer.pooled.shape == (1, space.pooled_width)
    assert header.space == space


@every_family("train")
@pytest.mark.slow
def test_a_cache_and_gradient_checkpointing_give_the_same_losses(recipe, folder, tmp_path):
    train_align(recipe, tmp_path / "pixels", load_diffusion=load)
    given = [
        "--format",
        "jsonl",
        "--out",
        str(tmp_path / "cache"),
        "--diffusion",
        str(folder),
        "--picture-size",
        "16",
    ]
    assert main(["data", "cache", recipe.data.path, *given]) == 0
    cached = change_recipe(recipe, cache=str(tmp_path / "cache"), gradient_checkpointing=True)
    train_align(cached, tmp_path / "cached", load_diffusion=refusing)
    assert len(losses(tmp_path / "pixels")) == 3
    for pixels, kept in zip(losses(tmp_path / "pixels"), losses(tmp_path / "cached"), strict=True):
        assert kept == pytest.approx(pixels, rel=1e-4)


@every_family("train")
def test_the_loss_is_the_squared_error_of_the_velocity(folder, family):
    diffusion = load(folder)
    size = diffusion.side // diffusion.pipeline.vae_scale_factor
    latents, noise = torch.randn(2, 2, 16, size, size)
    sigma, answer = torch.tensor([0.2, 0.9]), diffusion.encode(["a fox", "a bear"])
    with torch.no_grad():
        found = diffusion.loss(answer, latents, noise, sigma, 5.0)
        errors = []
        for row in range(2):
            one = conditioning.Conditioning(answer.tokens[row : row + 1], answer.pooled[row : row + 1])
            noisy = latents[row] + sigma[row] * (noise[row] - latents[row])  # from the picture to the noise
            velocity = by_hand(family, diffusion.pipeline, noisy[None], sigma[row : row + 1], one)
            errors.append((velocity[0] - (noise[row] - latents[row])).square().mean().item())
    assert found.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_flux_without_guidance_is_asked_without(folders):
    diffusion = load(folders["schnell"])
    answer, sigma = diffusion.encode(["a fox"]), torch.tensor([0.3])
    noisy = torch.randn(1, 16, 4, 8)  # higher than wide: rows and columns are told apart
    with torch.no_grad():
        found = diffusion.predict(noisy, sigma, answer)
        expected = flux_by_hand(diffusion.pipeline, noisy, sigma, answer)
    assert torch.allclose(found, expected, atol=1e-5)


@every_family("train")
def test_a_conditioning_gets_a_gradient_through_the_frozen_model(folder):
    diffusion = load(folder)
    size = diffusion.side // diffusion.pipeline.vae_scale_factor
    answer = diffusion.encode(["a fox"])
    given = conditioning.Conditioning(
        answer.tokens.clone().requires_grad_(), answer.pooled.clone().requires_grad_()
    )
    latents, noise = torch.randn(2, 1, 16, size, size)
    diffusion.loss(given, latents, noise, torch.tensor([0.5]), 5.0).backward()
    assert given.tokens.grad.abs().sum() > 0 and given.pooled.grad.abs().sum() > 0


def test_the_loss_of_the_true_velocity_is_zero_and_every_sample_weighs_alike():
    clean, noise = torch.randn(2, 2, 16, 4, 4)
    assert flow_loss(noise - clean, clean, noise).item() == pytest.approx(0, abs=1e-12)
    off = torch.stack([torch.full((16, 4, 4), 1.0), torch.full((16, 4, 4), 3.0)])
    assert flow_loss(noise - clean + off, clean, noise).item() == pytest.approx((1 + 9) / 2, rel=1e-5)


@every_family("train")
def test_times_are_logit_normal_shifted_as_the_scheduler_shifts(folder):
    diffusion = load(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    for given, expected in (
        ({"shift": 3.0, "use_dynamic_shifting": False}, math.log(3)),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 28}, 0.5 + 0.65 * 12 / 24),
    ):  # fmt: skip
        diffusion.pipeline.scheduler.register_to_config(**given)
        logits = torch.logit(diffusion.timesteps(generators).double())
        assert logits.mean().item() == pytest.approx(expected, abs=0.1)
        assert logits.std().item() == pytest.approx(1, abs=0.05)


@every_family("train")
def test_the_times_of_a_sample_follow_from_its_seed_alone(folder):
    diffusion = load(folder)
    both = diffusion.timesteps([torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert torch.equal(diffusion.timesteps([torch.Generator().manual_seed(6)]), both[1:])


def test_a_space_that_is_not_the_models_is_said_before_anything_is_trained(tiny_llm, folders):
    targets = TextTargets(load(folders["sd3"]), ["a fox"])
    recipe = make_recipe(AlignRecipe, space="sd3", tokens=154)
    with pytest.raises(
        BadInputError, match=r"sd3 \(154 x 4096 .* expects StableDiffusion3Pipeline \(154 x 48 "
    ):
        new_mapper(recipe, tiny_llm, targets)
    with (
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(BadInputError, match="Set tokens=154, or caption"),
    ):
        patched.setitem(conditioning.SPACES, "toy_sd3", SPACES["sd3"])
        new_mapper(make_recipe(AlignRecipe, space="toy_sd3"), tiny_llm, targets)


# Targets and latents


def test_sd3s_targets_are_two_clips_side_by_side_and_then_t5(folders):
    diffusion = load(folders["sd3"])
    answer, pipeline = diffusion.encode(["a fox", ""]), diffusion.pipeline
    assert answer.tokens.shape == (2, 154, WIDTH) and answer.pooled.shape == (2, 22)
    ids = pipeline.tokenizer(["a fox", ""], padding="max_length", return_tensors="pt").input_ids
    both = [part(ids, output_hidden_states=True) for part in (pipeline.text_encoder, pipeline.text_encoder_2)]
    tokens = torch.cat([part.hidden_states[-2] for part in both], -1)
    assert torch.allclose(answer.tokens[:, :77, :40], tokens, atol=1e-6)
    assert not answer.tokens[:, :77, 40:].any()
    letters = pipeline.tokenizer_3(["a fox", ""], padding="max_length", max_length=77, return_tensors="pt")
    assert torch.allclose(
        answer.tokens[:, 77:], pipeline.text_encoder_3(letters.input_ids).last_hidden_state, atol=1e-6
    )
    assert torch.allclose(answer.pooled, torch.cat([part.text_embeds for part in both], -1), atol=1e-6)


def test_fluxs_targets_are_t5s_tokens_and_the_pooled_vector_of_a_clip(folders):
    diffusion = load(folders["flux"])
    answer, pipeline = diffusion.encode(["a fox", ""]), diffusion.pipeline
    letters = pipeline.tokenizer_2(["a fox", ""], padding="max_length", max_length=256, return_tensors="pt")
    tokens = pipeline.text_encoder_2(letters.input_ids).last_hidden_state
    assert answer.tokens.shape == (2, 256, WIDTH) and torch.allclose(answer.tokens, tokens, atol=1e-6)
    ids = pipeline.tokenizer(["a fox", ""], padding="max_length", return_tensors="pt").input_ids
    assert torch.allclose(answer.pooled, pipeline.text_encoder(ids).pooler_output, atol=1e-6)


@pytest.mark.parametrize("how", ["deleted", "null"])
def test_sd3_without_t5_is_trained_on_zeros_in_its_place(folders, tmp_path, how):
    shutil.copytree(folders["sd3"], tmp_path, dirs_exist_ok=True)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / name)
    if how == "null":
        index = json.loads((tmp_path / "model_index.json").read_text())
        nothing = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index | nothing))
    diffusion, whole = load(tmp_path), load(folders["sd3"])
    answer, full = diffusion.encode(["a fox"]), whole.encode(["a fox"])
    assert torch.equal(answer.tokens[:, :77], full.tokens[:, :77]) and torch.equal(answer.pooled, full.pooled)
    assert answer.tokens.shape == (1, 154, WIDTH) and not answer.tokens[:, 77:].any()
    assert len(diffusion.token_ids("a fox")) == 2 and len(whole.token_ids("a fox")) == 3
    targets = TextTargets(diffusion, ["a fox", "a bear"])
    assert (targets.std[77:] == torch.tensor(1e-2)).all()
    assert targets.loss(answer, ["a fox"], standardised=True).item() == 0


def test_a_model_without_the_text_encoders_that_a_mapper_learns_from_is_refused(folders, tmp_path):
    shutil.copytree(folders["sd3"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "text_encoder_2")
    with pytest.raises(BadInputError, match=r"comes without its text_encoder_2, .* Give the whole folder"):
        load(tmp_path)


@every_family("train")
def test_latents_are_shifted_and_scaled(folder):
    diffusion = load(folder)
    vae, side = diffusion.pipeline.vae, diffusion.side
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    found = diffusion.latents([Image.fromarray(pixels)])
    scaled = torch.from_numpy(pixels).float().permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        plain = vae.encode(scaled).latent_dist.mean
    assert (
        torch.allclose(found, (plain - vae.config.shift_factor) * vae.config.scaling_factor, atol=1e-5)
        and vae.config.shift_factor
    )


# Drawing


@every_family("diffusers")
def test_a_target_draws_what_its_caption_draws(folder, family):
    diffusion = load(folder)
    drawn = diffusion.generate(diffusion.encode(["a fox", "a bear"]), diffusion.encode([""]), seed=3)
    generator = torch.Generator().manual_seed(3)
    same = {
        "height": diffusion.side, "width": diffusion.side, "num_inference_steps": 15, "generator": generator,
        "max_sequence_length": diffusion.t5_tokens, "guidance_scale": diffusion.guidance,
    }  # fmt: skip
    asked = {"sd3": {"negative_prompt": ""}, "flux": {}}[family]
    for picture, caption in zip(drawn, ["a fox", "a bear"], strict=True):
        expected = diffusion.pipeline(caption, **same, **asked).images[0]
        assert picture.size == (diffusion.side,) * 2
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(drawn[1], int)).max() > 1


def test_flux_is_guided_away_from_the_mappers_negative_where_true_cfg_scale_asks_for_it(folders):
    diffusion = load(folders["schnell"])
    pipeline, side = diffusion.pipeline, diffusion.side
    given = prompt_arguments(diffusion.encode(["a fox"]), diffusion.encode([""]))
    same = {
        "height": side, "width": side, "num_inference_steps": 2, "output_type": "latent", "true_cfg_scale": 4.0,
    }  # fmt: skip
    drawn, told, plain = (
        pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
        for arguments in (
            same | given,
            same | {"prompt": "a fox", "negative_prompt": "", "max_sequence_length": 256},
            same | given | {"true_cfg_scale": 1.0},
        )
    )
    assert torch.allclose(drawn, told, atol=1e-5) and not torch.allclose(drawn, plain, atol=1e-3)


@every_family("diffusers")
def test_a_story_is_told_with_pictures(folder, family, tiny_llm):
    torch.manual_seed(0)
    pipeline = load_diffusion(folder)
    pipeline.default_sample_size = 8  # Flux's would be 128, whatever its size
    space = space_of(pipeline, SPACES[family])
    assert space == SPACES[family]
    teller = StoryTeller(tiny_llm, build_mapper(compact_config(space, tiny_llm.width)).eval(), pipeline)
    one, other = teller.tell(Story("Mia the fox.", seed=4), scenes=2, steps=2)
    assert one.picture is not None and one.picture.tobytes() != other.picture.tobytes()
