"""Pipelines of diffusers' own classes at toy size: SD3, Flux with and without guidance, SDXL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from minigpt5_core.conditioning import Space
from trainer.diffusion import FrozenDiffusion, load_frozen_diffusion

STORYBOOK = Path(__file__).parents[1] / "storybook" / "diffusers"
WIDTH = 48  # of T5
CLIPS = ((16, 12), (24, 10))  # widths of their tokens and of their pooled vectors
XL_WIDTHS, XL_POOLED = (16, 24), 20
SPACES = {
    "sd3": Space("toy_sd3", 154, WIDTH, 22),
    "flux": Space("toy_flux", 256, WIDTH, 24),
    "sdxl": Space("toy_xl", 77, sum(XL_WIDTHS), XL_POOLED),
}


def clip(tokenizer, width, pooled, kind=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=pooled,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def t5():
    """A T5 that reads letters, and its tokenizer."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz.,▁"]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def autoencoder(scale, shift):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip


def sd3():
    tokenizer = CLIPTokenizer.from_pretrained(STORYBOOK / "tokenizer")
    first, second = (clip(tokenizer, *sizes) for sizes in CLIPS)
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=WIDTH, pooled_projection_dim=22, pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    third, letters = t5()
    vae = autoencoder(1.5305, 0.0609)
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae, first, tokenizer, second, tokenizer, third, letters
    )


def flux(guided=True):
    tokenizer = CLIPTokenizer.from_pretrained(STORYBOOK / "tokenizer")
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=24, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    reader, letters = t5()
    first = clip(tokenizer, 24, 10, CLIPTextModel)
    return FluxPipeline(
        scheduler, autoencoder(0.3611, 0.1159), first, tokenizer, reader, letters, transformer
    )


def sdxl():
    """SDXL's own classes: two tokenizers, two text encoders, a UNet that wants a pooled text and sizes."""
    tokenizer = CLIPTokenizer.from_pretrained(STORYBOOK / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=sum(XL_WIDTHS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + XL_POOLED, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    first, second = (clip(tokenizer, width, XL_POOLED) for width in XL_WIDTHS)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusionXLPipeline(
        vae, first.text_model, second, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


MAKERS = {"sd3": sd3, "flux": flux, "schnell": lambda: flux(guided=False), "sdxl": sdxl}


def save(name, folder):
    """Random weights, the same every time."""
    torch.manual_seed(0)
    MAKERS[name]().save_pretrained(folder)


def load(folder: Path, precision: str = "float32", picture_size: int = 0) -> FrozenDiffusion:
    """For training, with small pictures: Flux has the size of its pictures nowhere but in its pipeline's code."""
    diffusion = load_frozen_diffusion(folder, precision, picture_size)
    if isinstance(diffusion.pipeline, FluxPipeline):
        diffusion.pipeline.default_sample_size = 8
    return diffusion


def refusing(folder: Path, precision: str = "float32", picture_size: int = 0) -> FrozenDiffusion:
    """The same, but it encodes no text and no picture: all of that is to come from a feature cache."""
    diffusion: Any = load(folder, precision, picture_size)
    diffusion.encode_prompt = lambda texts: pytest.fail("a text was encoded")
    diffusion.latents = lambda pictures: pytest.fail("a picture was encoded")
    return diffusion
