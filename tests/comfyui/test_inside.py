"""What our loaders give ComfyUI, against diffusers and PEFT: the same numbers, and no trace of an adapter."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PACK = Path(__file__).parents[2]
STORYBOOK = PACK / "storybook"


@pytest.fixture
def inside(tmp_path, request):
    """Runs a job of inside.py in ComfyUI's Python: inside(job, **tensors) -> tensors."""
    from minigpt5_core.llm_files import default_llm

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
            command, cwd=conftest.comfyui(), capture_output=True, text=True, env=os.environ, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(out)

    return run


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
    from minigpt5_core.llm_files import default_llm

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
