"""The storybook's text-to-image model, untrained: CLIP tokenizer and text encoder, UNet; and how to train it."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..world.stories import stories
from .autoencoder import LOCAL_SAFETENSORS

TOKENS = 77


@dataclass(frozen=True)
class DiffusionRecipe:
    """How to train text encoder and UNet.

    Until `freeze_text_encoder_share` of the steps both learn; then only the UNet does, so that a mapper can be aligned
    with the text encoder meanwhile.

    Cells that show hero, prop or companion have `figure_weight` in the loss: they are a quarter of the picture, and
    the hard part of it. Noisy timesteps have up to `layout_weight`, as in a loss on the predicted picture: the layout
    is decided there, and the error of the predicted noise hardly shows it.

    `noise_offset` is the standard deviation of the noise's mean, so that day and night cannot be read off that mean:
    the last timestep of training still holds some of the picture, and the pure noise of sampling holds none.

    Encoded captions that differ in one fact are pushed apart until `margin`, in units of the standard deviation over
    captions: learned from pictures alone, the place takes most of it, and two props are closer together than a mapper
    can tell apart.
    """

    scenes: int = 8000
    steps: int = 2600
    batch: int = 24
    learning_rate: float = 8e-4
    freeze_text_encoder_share: float = 0.4
    sentence_share: float = 0.3
    empty_share: float = 0.1
    min_snr_gamma: float = 5.0
    figure_weight: float = 1.0
    layout_weight: float = 1.0
    noise_offset: float = 0.0
    margin: float = 0.4
    margin_weight: float = 0.1
    ema_decay: float = 0.998
    text_width: int = 128
    text_layers: int = 2
    block_out_channels: tuple = (64, 128, 128)
    seed: int = 0


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges cover the world's words; printable characters keep a token of their own."""
    corpus = [
        text for story in islice(stories(99), 3000) for s in story for text in (s.text, s.caption, s.request)
    ]
    corpus += [" ".join(string.printable)] * 3
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=1536, show_progress=False)
    tokenizer.model_max_length = TOKENS
    return tokenizer


def build_text_encoder(recipe: DiffusionRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small untrained CLIP text encoder, (B, 77) ids -> (B, 77, text_width)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return CLIPTextModel(config)


def build_unet(recipe: DiffusionRecipe, latent_channels: int) -> UNet2DConditionModel:
    """A small untrained UNet over 16x16 latents."""
    levels = len(recipe.block_out_channels)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=recipe.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
    )


def build_pipeline(recipe: DiffusionRecipe, autoencoder: Path) -> StableDiffusionPipeline:
    """The whole untrained text-to-image pipeline around a trained autoencoder."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(autoencoder, **LOCAL_SAFETENSORS)
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(recipe, tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(recipe, vae.config.latent_channels),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            use_karras_sigmas=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encode_texts(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """(B, 77, C), as the pipeline itself encodes prompts."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = tokenizer.model_max_length
    ids = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return encoder(ids.input_ids.to(encoder.device))[0]
