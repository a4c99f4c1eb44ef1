"""Flux at its full size, as shapes without memory: what its recipe says that a training takes."""

import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from minigpt5_core.conditioning import SPACES
from minigpt5_core.conditioning.mapper import build_mapper, compact_config

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[1] / "trainer" / "recipes" / "own_stories_flux.toml"
COMMENT = " ".join(line.lstrip("# ") for line in RECIPE.read_text().splitlines() if line.startswith("#"))
BLOCKS, WIDTH = 19 + 38, 3072


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def transformer(layers: int = 19, single_layers: int = 38) -> FluxTransformer2DModel:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=layers, num_single_layers=single_layers, guidance_embeds=True
        )
    return model.bfloat16().requires_grad_(False)


def parts() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "LLM": LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                    num_attention_heads=32, tie_word_embeddings=True,
                )
            ),
            "transformer": transformer(),
            "T5": T5EncoderModel(
                T5Config(
                    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
                )
            ),
            "CLIP": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "VAE": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
        }  # fmt: skip


def kept_for_backward(model: FluxTransformer2DModel, side: int) -> tuple[float, float]:
    """Bytes that a picture's forward keeps, but for weights and for what flash attention does not keep; and FLOPs."""
    patches = (side // 16) ** 2
    tokens = patches + 256
    bf16 = {"device": "meta", "dtype": torch.bfloat16}
    answer = torch.zeros(1, 256, 4096, **bf16, requires_grad=True)
    places = torch.zeros(patches, 3, device="meta"), torch.zeros(256, 3, device="meta")
    moment = torch.zeros(1, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights and tensor.shape[-2:].count(tokens) < 2:
            kept[storage] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        given = torch.zeros(1, patches, 64, **bf16), answer, torch.zeros(1, 768, **bf16), moment
        model(*given, *places, moment).sample.sum().backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return size, counter.get_total_flops()


def test_the_recipe_says_what_the_weights_take():
    found = {name: numbers(part) for name, part in parts().items()}
    assert found["transformer"] == 11_901_408_320
    for name, count in found.items():
        said = f"{name} {count / 1e9:.2f} B {2 * count / 1e9:.1f} GB"
        assert said in COMMENT
    mapper = numbers(build_mapper(compact_config(SPACES["flux"], 2048)))
    lora = 24 * 2 * 8 * (2048 + 2048)  # query and value of 24 layers, of rank 8
    assert f"mapper {mapper / 1e6:.1f} M, LoRA {lora / 1e6:.1f} M" in COMMENT
    total = 2 * sum(found.values()) + 16 * (mapper + lora)
    assert f": {total / 1e9:.0f} GB, and after" in COMMENT
    assert f"would take {4 * sum(found[name] for name in found if name != 'LLM') / 1e9:.0f} GB" in COMMENT


def inputs_of_blocks(side: int) -> int:
    """Bytes: with gradient checkpointing nothing else is kept of a block."""
    return BLOCKS * ((side // 16) ** 2 + 256) * WIDTH * 2


def test_the_recipe_says_what_pictures_take():
    whole = transformer()
    whole.enable_gradient_checkpointing()
    kept, work = kept_for_backward(whole, 512)
    assert kept == pytest.approx(inputs_of_blocks(512), rel=0.08)
    assert f"5 x {work / 1e12:.0f} in the transformer" in COMMENT
    weights = 2 * sum(map(numbers, parts().values()))
    took = {}
    for side in (512, 1024):
        block = max(kept_for_backward(transformer(*one), side)[0] for one in ((1, 0), (0, 1)))
        took[side] = 5 * (inputs_of_blocks(side) + block)
    more = [f"{took[side] / 1e9:.0f} GB" for side in took]
    totals = [f"{(weights + took[side]) / 1e9:.0f}" for side in took]
    assert f"{more[0]} more for a story's five pictures of 512, or {more[1]} for five of 1024" in COMMENT
    assert f"(picture_size=0): {totals[0]} or {totals[1]} GB" in COMMENT
    assert tomllib.loads(RECIPE.read_text())["model"]["picture_size"] == 512
