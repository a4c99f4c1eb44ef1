"""The frozen text-to-image model as training needs it: its text encoders' answers, and how wrong it is about noise.

SD 1.5, SD 2.1 and SDXL in diffusers' layout, which predict noise or velocity; the storybook's model is of SD's kind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import caption_loss, compute_snr, diffusion_loss, target_statistics
from minigpt5_core.pipeline import load_diffusion, prompt_arguments

from .data.records import Picture
from .storybook.autoencoder import encode_pictures


class Features(Protocol):
    """Answers that were kept: a picture's latents (C, h, w), a caption's conditioning, no batch; None where not."""

    def latents(self, picture: Picture) -> Tensor | None: ...

    def target(self, caption: str) -> Conditioning | None: ...


class Backbone:
    """A frozen pipeline; everything in float32, on the pipeline's device. `features` are asked before it answers."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.features: Features | None = None
        self.xl = isinstance(pipeline, StableDiffusionXLPipeline)
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        kind = self.noise.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise BadInputError(
                f"The diffusion model predicts {kind!r}; only epsilon and v_prediction are trained on."
            )
        self.velocity = kind == "v_prediction"

    @property
    def side(self) -> int:
        """Of the pictures it was trained on, in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device) -> "Backbone":
        self.pipeline.to(device)
        return self

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """What its own text encoders answer: tokens (B, T, C), and SDXL's pooled (B, P)."""
        if self.features is None:
            return self._encode(texts)
        kept = {text: self.features.target(text) for text in dict.fromkeys(texts)}
        lacking = [text for text, answer in kept.items() if answer is None]
        if lacking:
            fresh = self._encode(lacking)
            kept |= {text: _row(fresh, index) for index, text in enumerate(lacking)}
        return _stack([kept[text] for text in texts], self.pipeline.device)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Conditioning:
        with torch.autocast(self.pipeline.device.type, enabled=False):
            found = self.pipeline.encode_prompt(
                list(texts),
                device=self.pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return Conditioning(found[0], found[2] if self.xl else None)

    @torch.no_grad()
    def latents(self, pictures: list[Image.Image]) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures of `side` pixels."""
        with torch.autocast(self.pipeline.device.type, enabled=False):
            return encode_pictures(self.pipeline.vae, pictures)

    def loss(
        self, answer: Conditioning, latents: Tensor, noise: Tensor, steps: Tensor, gamma: float
    ) -> Tensor:
        """The diffusion loss under a conditioning, weighed by min-SNR, at timesteps `steps` (B,)."""
        noisy = self.noise.add_noise(latents, noise, steps)
        extra = {}
        if self.xl:
            # as a picture that was neither scaled nor cropped: original size, corner, size
            sizes = latents.new_tensor([[self.side, self.side, 0, 0, self.side, self.side]])
            extra = {
                "added_cond_kwargs": {
                    "text_embeds": answer.pooled,
                    "time_ids": sizes.expand(len(latents), -1),
                }
            }
        predicted = self.pipeline.unet(noisy, steps, answer.tokens, **extra).sample
        target = self.noise.get_velocity(latents, noise, steps) if self.velocity else noise
        snr = compute_snr(self.noise.alphas_cumprod, steps)
        return diffusion_loss(predicted, target, snr, gamma, self.velocity)

    @torch.no_grad()
    def draw(self, positive: Conditioning, negative: Conditioning, seed: int = 0) -> list[Image.Image]:
        """A picture for each conditioning, guided away from the one negative; drawn one by one, to save memory."""
        generator = torch.Generator().manual_seed(seed)
        return [
            self.pipeline(
                **prompt_arguments(_batch_of_one(positive, index), negative),
                num_inference_steps=15,
                guidance_scale=3.0,
                generator=generator,
            ).images[0]
            for index in range(len(positive.tokens))
        ]


def _batch_of_one(answer: Conditioning, index: int) -> Conditioning:
    pooled = None if answer.pooled is None else answer.pooled[index : index + 1]
    return Conditioning(answer.tokens[index : index + 1], pooled)


def _row(answer: Conditioning, index: int) -> Conditioning:
    return Conditioning(answer.tokens[index], None if answer.pooled is None else answer.pooled[index])


def _stack(answers: Sequence[Conditioning | None], device: torch.device) -> Conditioning:
    present = [answer for answer in answers if answer is not None]
    pooled = [answer.pooled for answer in present if answer.pooled is not None]
    tokens = torch.stack([answer.tokens.to(device) for answer in present])
    return Conditioning(tokens, torch.stack([one.to(device) for one in pooled]) if pooled else None)


def load_backbone(folder: Path) -> Backbone:
    """The model of a diffusers folder, frozen; BadInputError when there is none, or one of another kind."""
    pipeline = load_diffusion(folder)
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise BadInputError(
            f"{folder} holds a {type(pipeline).__name__}; mappers are trained for StableDiffusionPipeline (SD 1.5, "
            "SD 2.1) and StableDiffusionXLPipeline. Set diffusion to one of these."
        )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipeline.vae.enable_slicing()  # a batch of large pictures at once would need more than training does
    pipeline.safety_checker = None  # not asked in training, and larger than SD 1.5's text encoder
    return Backbone(pipeline)


class Targets:
    """What the mapper should answer: the text encoders on the full caption; and their spread over many captions."""

    def __init__(self, backbone: Backbone, captions: Sequence[str]) -> None:
        self.backbone = backbone
        parts = [backbone.encode(captions[i : i + 64]) for i in range(0, len(captions), 64)]
        states = torch.cat([part.tokens for part in parts])
        self.mean, self.deviation = target_statistics(states, smallest=1e-2)
        pooled = [part.pooled for part in parts if part.pooled is not None]
        self.pooled_deviation = (
            target_statistics(torch.cat(pooled)[:, None], smallest=1e-2)[1] if pooled else None
        )

    def loss(self, answer: Conditioning, texts: Sequence[str], standardised: bool) -> Tensor:
        """The distance of the mapper's answer from theirs, tokens and pooled counted alike."""
        wanted = self.backbone.encode(texts)
        loss = caption_loss(answer.tokens, wanted.tokens, self.deviation if standardised else None)
        if answer.pooled is None or wanted.pooled is None:
            return loss
        scale = self.pooled_deviation if standardised else None
        return loss + caption_loss(answer.pooled[:, None], wanted.pooled[:, None], scale)
