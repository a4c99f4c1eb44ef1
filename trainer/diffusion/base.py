"""What every family's frozen model does in training, and what a family has to say of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.diffusion import prompt_arguments
from minigpt5_core.errors import BadInputError

from ..common.images import encode_pictures
from ..data.source import Features
from .picture_size import check_picture_size


@dataclass(frozen=True)
class Unloaded:
    """What a denoiser that is not loaded says of itself."""

    config: Any


class FrozenDiffusion:
    """A frozen pipeline, on its device and in its precision, float32 or bf16; losses are in float32 all the same.

    Of a pipeline without denoiser and VAE there are its text encoders' answers alone: it does not draw.

    `features` are asked before it answers. `picture_size` is that of the pictures it is trained with, in pixels (0: its
    own); BadInputError for one that it cannot take.

    `needed` are the text encoders without which there is no answer. `pools`: whether they give a pooled vector too.
    `guidance` is that of previews. `answer_settings` says what answers follow from besides text encoders and token ids,
    where there is something.
    """

    needed: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    pools = True
    guidance = 3.0
    answer_settings = ""

    def __init__(self, pipeline: DiffusionPipeline, picture_size: int = 0) -> None:
        if lacking := [name for name in self.needed if getattr(pipeline, name) is None]:
            raise BadInputError(
                f"The diffusion model comes without its {' and '.join(lacking)}, whose answers a mapper learns. Give "
                "the whole folder."
            )
        check_picture_size(pipeline, picture_size)
        self.pipeline, self.picture_size = pipeline, picture_size
        self.features: Features | None = None

    @property
    def denoiser(self) -> Any:
        """The part that predicts noise or velocity."""
        return self.pipeline.unet

    @property
    def draws(self) -> bool:
        """Whether denoiser and VAE are there, so that there are latents, the diffusion loss, and pictures."""
        return isinstance(self.denoiser, nn.Module) and self.pipeline.vae is not None

    @property
    def side(self) -> int:
        """Of the pictures it is shown and draws, in pixels."""
        return self.picture_size or self.own_side

    @property
    def own_side(self) -> int:
        """Of the pictures it was trained on, in pixels."""
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device) -> "FrozenDiffusion":
        self.pipeline.to(device)
        return self

    def text_encoders(self) -> list[Any]:
        """Those it has, in order."""
        return _parts(self.pipeline, "text_encoder")

    def token_ids(self, text: str) -> list[list[int]]:
        """What each tokenizer makes of a text, which is all that the text encoders learn of it."""
        return [padded_ids(one, text, one.model_max_length) for one in _parts(self.pipeline, "tokenizer")]

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """What its own text encoders answer: tokens (B, T, C), and where the family has one pooled (B, P).

        In the pipeline's precision.
        """
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
            return self.encode_prompt(list(texts))

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        """As `encode`, of the pipeline's own `encode_prompt`."""
        raise NotImplementedError

    @torch.no_grad()
    def latents(self, pictures: list[Image.Image]) -> Tensor:
        """Latents (B, C, h, w), shifted and scaled as the family's VAE says, of pictures of `side` pixels.

        In float32, in whatever precision the VAE is.
        """
        with torch.autocast(self.pipeline.device.type, enabled=False):
            return encode_pictures(self.pipeline.vae, pictures)

    def timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        """One drawn moment of the noising for each sample, (B,), as `loss` takes them; from generators on the CPU."""
        raise NotImplementedError

    def loss(
        self, answer: Conditioning, latents: Tensor, noise: Tensor, timesteps: Tensor, gamma: float
    ) -> Tensor:
        """How wrong the model is under a conditioning about latents that were noised to `timesteps` (B,).

        `gamma` is that of min-SNR, for the families that are weighed by it.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, positive: Conditioning, negative: Conditioning, seed: int = 0) -> list[Image.Image]:
        """A picture for each conditioning, guided away from the one negative; drawn one by one, to save memory."""
        generator = torch.Generator().manual_seed(seed)
        return [
            self.pipeline(
                **prompt_arguments(_batch_of_one(positive, index), negative, self.denoiser.dtype),
                height=self.side,
                width=self.side,
                num_inference_steps=15,
                guidance_scale=self.guidance,
                generator=generator,
            ).images[0]
            for index in range(len(positive.tokens))
        ]


def padded_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """The ids of a text, cut or padded to `length`."""
    return list(tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids)


def _parts(pipeline: DiffusionPipeline, name: str) -> list[Any]:
    """The pipeline's tokenizers or text encoders, one to three."""
    found = (getattr(pipeline, one, None) for one in (name, f"{name}_2", f"{name}_3"))
    return [part for part in found if part is not None]


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
