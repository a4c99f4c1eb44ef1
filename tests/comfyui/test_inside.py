"""What our loaders give ComfyUI, against diffusers and PEFT: the same numbers, and no trace of an adapter."""

import math
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt5_core.conditioning.mapper_file import load_mapper

PACK = Path(__file__).parents[2]
STORYBOOK = PACK / "storybook"


@pytest.fixture
def inside(tmp_path, request):
    """Runs a job of inside.py in ComfyUI's Python: inside(job, **tensors) -> tensors."""
    from minigpt5_core.llm.files import default_llm

    default_llm()
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parent / "conftest.py"))

    def run(job, **given):
        source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        save_file(given, source)
        command = [
            str(conftest.comfyui_python()), str(Path(__file__).parent / "inside.py"), str(PACK), str(out), job,
            str(source),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=conftest.comfyui(), capture_output=True, text=True, env=os.environ, timeout=900
        )
        if "bitsandbytes, which is not installed" in done.stderr:
            pytest.skip("no bitsandbytes in ComfyUI's Python")
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(out)

    return run


@pytest.mark.space("storybook", "ComfyUI")
@torch.no_grad()
def test_the_storybooks_models_compute_in_comfyui_what_they_compute_in_diffusers(inside):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(STORYBOOK / "diffusers", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    timesteps, context = torch.tensor([10.0, 700.0]), torch.randn(2, 77, 128, generator=generator)
    pictures = torch.rand(2, 128, 128, 3, generator=generator)
    found = inside("models", latents=latents, timesteps=timesteps, context=context, pictures=pictures)

    def worst(name, expected):
        return (found[name] - expected).abs().max().item()

    assert worst("unet", pipeline.unet(latents, timesteps, context).sample) < 1e-5
    text = "a fox with a red balloon in the snow by day"
    ids = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    assert worst("text", pipeline.text_encoder(ids)[0]) < 1e-5
    scale = pipeline.vae.config.scaling_factor
    decoded = pipeline.vae.decode(latents / scale).sample.clamp(-1, 1).permute(0, 2, 3, 1) / 2 + 0.5
    assert worst("decoded", decoded) < 1e-5
    encoded = pipeline.vae.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latents * scale
    assert worst("encoded", encoded) < 1e-5
    alphas = pipeline.scheduler.alphas_cumprod
    assert torch.allclose(found["sigmas"], ((1 - alphas) / alphas).sqrt(), rtol=1e-4)


@torch.no_grad()
def test_an_adapter_gives_what_peft_gives_and_leaves_no_trace(inside):
    from peft import PeftModel

    from minigpt5_core.llm import load_llm
    from minigpt5_core.llm.files import default_llm

    llm = load_llm(default_llm(), 8)
    ids = torch.tensor([[1, 400, 500, *llm.voken_ids, 2, 30]])
    plain = llm.causal_lm(ids).logits
    adapted = PeftModel.from_pretrained(llm.causal_lm, str(STORYBOOK / "loras" / "storybook")).eval()
    found = inside("adapter", ids=ids)
    assert (found["plain_logits"] - plain).abs().max() < 1e-4
    assert (found["adapted_logits"] - adapted(ids).logits).abs().max() < 1e-3
    assert (found["adapted_logits"] - found["plain_logits"]).abs().max() > 1  # it did something
    assert found["same_again"].all()
    assert 0 < found["same_adapted"].mean() < 1
    assert torch.equal(found["again_logits"], found["plain_logits"])


@torch.no_grad()
def test_an_adapter_over_4_bits_gives_what_the_core_gives_and_leaves_no_trace(inside):
    pytest.importorskip("bitsandbytes")
    from minigpt5_core.llm import load_adapter, load_llm
    from minigpt5_core.llm.files import default_llm
    from minigpt5_core.llm.precision import dtype_and_quantization

    llm = load_llm(default_llm(), 8, **dtype_and_quantization("4bit"))
    ids = torch.tensor([[1, 400, 500, *llm.voken_ids, 2, 30]])
    found = inside("packed", ids=ids)

    def apart(name, llm):
        logits = llm.logits(llm.read(llm.embed(ids)).last_hidden_state)
        return ((found[name] - logits).norm() / logits.norm()).item()

    assert apart("plain", llm) < 1e-3
    llm = load_adapter(llm, STORYBOOK / "loras" / "storybook")
    assert apart("adapted", llm) < 0.02 < apart("plain", llm)
    assert torch.equal(found["again"], found["plain"])


def make_sd3():
    """As ComfyUI knows SD3: as many blocks as heads, 64 wide each."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=64, caption_projection_dim=128,
        pos_embed_max_size=8,
    )  # fmt: skip


def make_flux():
    """As wide as ComfyUI takes every Flux to be, but two blocks deep."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).bfloat16().float()


def save_toy_mapper(space, path):
    from minigpt5_core.conditioning import SPACES
    from minigpt5_core.conditioning.mapper import build_mapper, compact_config
    from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper

    mapper = build_mapper(compact_config(SPACES[space], 16)).eval()
    save_mapper(path, mapper, MapperHeader(SPACES[space], "toy", 16, "abc"))
    return mapper


def euler(velocity, shift, scale, offset):
    """Three steps of rectified flow from the noise of seed 7, as ComfyUI numbers and shifts them; back from scale."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    even = torch.tensor([1.0, 0.667, 0.334] if shift == 3 else [1.0, 0.6667, 0.3334])
    sigmas = [*(shift * even / (1 + (shift - 1) * even)), torch.tensor(0.0)]
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        latents = latents + (following - sigma) * velocity(latents, sigma)
    return latents / scale + offset


@pytest.mark.space("sd3", "ComfyUI")
@torch.no_grad()
def test_comfyui_draws_with_sd3_from_vokens_what_diffusers_draws(inside, tmp_path):
    torch.manual_seed(0)
    transformer = make_sd3()
    save_file(transformer.state_dict(), tmp_path / "transformer.safetensors")
    save_toy_mapper("flux", tmp_path / "other.safetensors")
    mapper = save_toy_mapper("sd3", tmp_path / "mapper.safetensors")
    states = torch.randn(1, 8, 16)
    found = inside("flow", states=states, cfg=torch.tensor(4.0))
    sides = mapper(states), mapper.negative()

    def velocity(latents, sigma, cfg=4.0):
        one, other = (
            transformer(latents, side.tokens, side.pooled, 1000 * sigma[None]).sample for side in sides
        )
        return other + cfg * (one - other)

    expected = euler(velocity, 3.0, 1.5305, 0.0609)
    other = euler(partial(velocity, cfg=1.0), 3.0, 1.5305, 0.0609)
    assert found["refused"]
    assert (found["latents"] - expected).abs().max() < 1e-3 * (expected - other).abs().max()


@pytest.mark.slow
@pytest.mark.space("flux", "ComfyUI")
@torch.no_grad()
def test_comfyui_draws_with_flux_from_vokens_what_diffusers_draws(inside, tmp_path):
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    transformer = make_flux()
    half = {name: weight.bfloat16() for name, weight in transformer.state_dict().items()}
    save_file(half, tmp_path / "transformer.safetensors")
    save_toy_mapper("sd3", tmp_path / "other.safetensors")
    mapper = save_toy_mapper("flux", tmp_path / "mapper.safetensors")
    states = torch.randn(1, 8, 16)
    found = inside("flow", states=states, cfg=torch.tensor(1.0), guidance=torch.tensor(2.5))
    places = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

    def velocity(latents, sigma, answer):
        packed = transformer(
            FluxPipeline._pack_latents(latents, 1, 16, 8, 8), answer.tokens, answer.pooled, sigma[None], places,
            torch.zeros(256, 3), torch.tensor([2.5]),
        ).sample  # fmt: skip
        return FluxPipeline._unpack_latents(packed, 64, 64, 8)

    expected, other = (
        euler(partial(velocity, answer=answer), math.exp(1.15), 0.3611, 0.1159)
        for answer in (mapper(states), mapper.negative())
    )
    assert found["refused"]
    assert (found["latents"] - expected).abs().max() < 1e-3 * (expected - other).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make", "given", "sizes"),
    [
        ("sd3", make_sd3, {}, [154, 4096, 2048]),
        ("flux", make_flux, {"guidance": torch.tensor(3.5)}, [256, 4096, 768]),
    ],
)
def test_a_mapper_is_fitted_to_text_encoders_of_full_width_and_drives_the_sampler(
    inside, tmp_path, kind, make, given, sizes
):
    torch.manual_seed(0)
    half = {name: weight.bfloat16() for name, weight in make().state_dict().items()}
    save_file(half, tmp_path / "transformer.safetensors")
    found = inside("fit", nothing=torch.zeros(1), **given)
    assert found["sizes"].tolist() == sizes
    assert len(found["losses"]) == 20
    assert found["losses"][-5:].mean() < 0.9 * found["losses"][:5].mean()
    assert found["with"].isfinite().all()
    assert not torch.equal(found["with"], found["without"])
    _, header = load_mapper(tmp_path / f"{kind}.safetensors")
    assert header.space.name == kind
