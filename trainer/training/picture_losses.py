"""What a batch of voken states costs: caption alignment and the diffusion loss."""

import random
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.losses import drop_states

from ..common.images import center_crop
from ..data.source import PictureTarget
from ..diffusion import FrozenDiffusion, TextTargets
from .config import StageRecipe


class PictureLosses:
    """Caption alignment and diffusion loss of a batch of voken states, with classifier-free dropout.

    What is random about a picture follows from its seed, drawn on the CPU: the same on every device, and the same
    beside other pictures.
    """

    def __init__(self, recipe: StageRecipe, mapper: Mapper, text_targets: TextTargets) -> None:
        self.settings, self.mapper, self.text_targets = recipe.loss, mapper, text_targets
        self.aligns_captions = recipe.model.tokens == len(text_targets.mean)

    def counts(self, targets: Sequence[PictureTarget], uses_diffusion_loss: bool) -> dict[str, int]:
        """How many pictures each of the losses is a mean over: the diffusion loss is over those at hand."""
        aligned = {"caption": len(targets)} if self.aligns_captions else {}
        return aligned | ({"image": sum(one.at_hand for one in targets)} if uses_diffusion_loss else {})

    def __call__(
        self, states: Tensor, targets: Sequence[PictureTarget], uses_diffusion_loss: bool
    ) -> dict[str, Tensor]:
        """Means over the pictures, of voken states (B, V, L)."""
        if not targets:
            return {}  # a batch whose tasks ask for no picture
        generators = [torch.Generator().manual_seed(one.seed) for one in targets]
        parts = [
            drop_states(state[None], self.settings.dropout, generator)
            for state, generator in zip(states, generators, strict=True)
        ]
        answer = self.mapper(torch.cat([kept for kept, _ in parts]).float())
        losses = {}
        if self.aligns_captions:
            captions = ["" if gone else one.caption for (_, gone), one in zip(parts, targets, strict=True)]
            standardised = self.settings.caption_target == "standardised"
            losses["caption"] = self.text_targets.loss(answer, captions, standardised)
        at_hand = [row for row, one in enumerate(targets) if one.at_hand]
        if uses_diffusion_loss and at_hand:
            drawn = [targets[row] for row in at_hand]
            own = [generators[row] for row in at_hand]
            losses["image"] = self._diffusion_loss(_rows(answer, at_hand), drawn, own)
        return losses

    def _diffusion_loss(
        self, answer: Conditioning, targets: Sequence[PictureTarget], generators: Sequence[torch.Generator]
    ) -> Tensor:
        diffusion = self.text_targets.diffusion
        latents = picture_latents(diffusion, targets)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
        timesteps = diffusion.timesteps(generators).to(latents.device)
        return diffusion.loss(
            answer, latents, noise.to(latents.device), timesteps, self.settings.min_snr_gamma
        )


def _rows(answer: Conditioning, rows: list[int]) -> Conditioning:
    """Of a batch, some rows in order; the batch itself where that is all of it."""
    if len(rows) == len(answer.tokens):
        return answer
    return Conditioning(answer.tokens[rows], None if answer.pooled is None else answer.pooled[rows])


def picture_latents(diffusion: FrozenDiffusion, targets: Sequence[PictureTarget]) -> Tensor:
    """Scaled latents of what is to be shown, at the size the diffusion model is trained with, (B, C, h, w)."""
    lacking = [one for one in targets if one.latents is None]
    fresh: Iterator[Tensor] = iter(())
    if lacking:
        pictures = [center_crop(_drawn(one), diffusion.side) for one in lacking]
        fresh = iter(diffusion.latents(pictures))
    device = diffusion.pipeline.device
    return torch.stack([next(fresh) if one.latents is None else one.latents.to(device) for one in targets])


def _drawn(target: PictureTarget) -> Image.Image:
    assert target.image is not None  # there is no diffusion loss of a picture that is only described
    return target.image(random.Random(target.seed))
