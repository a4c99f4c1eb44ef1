"""SD 1.5, SD 2.1 and SDXL: a UNet that predicts noise or velocity, at one of the scheduler's timesteps."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import compute_snr, diffusion_loss

from .base import FrozenDiffusion


class Sd(FrozenDiffusion):
    """SD 1.5 and SD 2.1. Timesteps are drawn evenly; the loss is weighed by min-SNR."""

    needed: tuple[str, ...] = ("text_encoder",)
    pools = False

    def __init__(self, pipeline: DiffusionPipeline, picture_size: int = 0) -> None:
        super().__init__(pipeline, picture_size)
        if not self.draws:
            return
        pipeline.safety_checker = None  # not asked in training, and larger than SD 1.5's text encoder
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        kind = self.noise.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise BadInputError(
                f"The diffusion model predicts {kind!r}; only epsilon and v_prediction are trained on."
            )
        self.velocity = kind == "v_prediction"

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        return Conditioning(self._encode_with_pipeline(texts)[0])

    def _encode_with_pipeline(self, texts: list[str]) -> Any:
        return self.pipeline.encode_prompt(
            texts, device=self.pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )

    def timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        most = self.noise.config.num_train_timesteps
        return torch.cat([torch.randint(0, most, (1,), generator=one) for one in generators])

    def loss(
        self, answer: Conditioning, latents: Tensor, noise: Tensor, timesteps: Tensor, gamma: float
    ) -> Tensor:
        dtype = self.denoiser.dtype
        given = answer.to(dtype)
        noisy = self.noise.add_noise(latents, noise, timesteps).to(dtype)
        predicted = self.denoiser(noisy, timesteps, given.tokens, **self.added_inputs(given)).sample
        target = self.noise.get_velocity(latents, noise, timesteps) if self.velocity else noise
        snr = compute_snr(self.noise.alphas_cumprod, timesteps)
        return diffusion_loss(predicted, target, snr, gamma, self.velocity)

    def added_inputs(self, answer: Conditioning) -> dict[str, Any]:
        """What the UNet is given besides tokens."""
        return {}


class Sdxl(Sd):
    """SDXL: two text encoders side by side, the pooled vector of the second, and sizes."""

    needed = ("text_encoder", "text_encoder_2")
    pools = True

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        found = self._encode_with_pipeline(texts)
        return Conditioning(found[0], found[2])

    def added_inputs(self, answer: Conditioning) -> dict[str, Any]:
        # as a picture that was neither scaled nor cropped: original size, corner, size; bf16 would round some
        sizes = answer.tokens.new_tensor(
            [[self.side, self.side, 0, 0, self.side, self.side]], dtype=torch.float32
        )
        return {
            "added_cond_kwargs": {
                "text_embeds": answer.pooled,
                "time_ids": sizes.expand(len(answer.tokens), -1),
            }
        }
