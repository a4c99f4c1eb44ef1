"""SD3, SD3.5 and Flux: a transformer that predicts the velocity of a straight way from picture to noise.

Rectified flow (arXiv 2403.03206). The moment of a sample is the share of noise in it, sigma. It is drawn as the
families were trained: logit-normal, then shifted towards noise as the scheduler shifts it for pictures of this size.
Every sample then weighs alike, for the draw itself is the weighting (section 3.1, "rf/lognorm(0.00, 1.00)").
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from minigpt5_core.conditioning import SPACES, Conditioning
from minigpt5_core.losses import flow_loss

from .base import FrozenDiffusion, padded_ids


class Flow(FrozenDiffusion):
    """What the families of this kind share. T5 reads `t5_tokens` of a caption, the rest being padding, which counts."""

    t5_tokens: int

    @property
    def denoiser(self) -> Any:
        return self.pipeline.transformer

    def timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        normal = torch.cat([torch.randn(1, generator=one) for one in generators])
        return torch.sigmoid(normal + self.shift())

    def shift(self) -> float:
        """By how much the logit of sigma is raised: a fixed amount, or more for larger pictures (eq. 23)."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return math.log(config.shift)
        patches = (self.side // self.pipeline.vae_scale_factor // 2) ** 2
        return calculate_shift(
            patches, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )

    def loss(
        self, answer: Conditioning, latents: Tensor, noise: Tensor, timesteps: Tensor, gamma: float
    ) -> Tensor:
        share = timesteps[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        dtype = self.denoiser.dtype
        return flow_loss(self.predict(noisy.to(dtype), timesteps, answer.to(dtype)), latents, noise)

    def predict(self, noisy: Tensor, sigma: Tensor, answer: Conditioning) -> Tensor:
        """The velocity at noisy latents (B, C, h, w), of the same shape; both and `answer` in the model's precision."""
        raise NotImplementedError


class Sd3(Flow):
    """SD3 and SD3.5: 77 tokens of two CLIPs side by side, filled with zeros to T5's width, then 77 of T5.

    Without T5, as many downloads are, its 77 are zeros: what the pipeline itself gives then, and what the model met in
    training wherever T5 was dropped. So a mapper always answers with 154 tokens.
    """

    t5_tokens = SPACES["sd3"].tokens - 77
    guidance = 4.5

    def __init__(self, pipeline: DiffusionPipeline, picture_size: int = 0) -> None:
        super().__init__(pipeline, picture_size)
        self.answer_settings = f"{77 + self.t5_tokens} x {self.denoiser.config.joint_attention_dim}"

    def token_ids(self, text: str) -> list[list[int]]:
        clip = [self.pipeline.tokenizer, self.pipeline.tokenizer_2]
        ids = [padded_ids(one, text, one.model_max_length) for one in clip]
        if self.pipeline.text_encoder_3 is not None:
            ids.append(padded_ids(self.pipeline.tokenizer_3, text, self.t5_tokens))
        return ids

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, device=self.pipeline.device, do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )  # fmt: skip
        return Conditioning(tokens, pooled)

    def predict(self, noisy: Tensor, sigma: Tensor, answer: Conditioning) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self.denoiser(noisy, answer.tokens, answer.pooled, timestep).sample


class Flux(Flow):
    """Flux: 256 tokens of T5, and the pooled vector of a CLIP.

    256 is what ComfyUI and Flux schnell give it; dev takes them too. A model with a guidance embedding is asked at
    guidance 1, where it is to predict the data's own velocity; previews are drawn at the usual 3.5, without a negative.
    """

    t5_tokens = SPACES["flux"].tokens
    guidance = 3.5

    @property
    def own_side(self) -> int:
        """Of the pictures it draws where nothing else is said; its configuration has no size."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def token_ids(self, text: str) -> list[list[int]]:
        clip = self.pipeline.tokenizer
        return [
            padded_ids(clip, text, clip.model_max_length),
            padded_ids(self.pipeline.tokenizer_2, text, self.t5_tokens),
        ]

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            texts, device=self.pipeline.device, max_sequence_length=self.t5_tokens
        )
        return Conditioning(tokens, pooled)

    def predict(self, noisy: Tensor, sigma: Tensor, answer: Conditioning) -> Tensor:
        batch, channels, height, width = noisy.shape
        guided = self.denoiser.config.guidance_embeds
        packed = self.denoiser(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            answer.tokens,
            answer.pooled,
            timestep=sigma,
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, noisy.device, noisy.dtype
            ),
            txt_ids=noisy.new_zeros(answer.tokens.shape[1], 3),
            guidance=torch.ones_like(sigma) if guided else None,
        ).sample
        scale = self.pipeline.vae_scale_factor
        return FluxPipeline._unpack_latents(packed, height * scale, width * scale, scale)
