"""What a batch of voken states costs: caption alignment and the diffusion loss."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.losses import drop_states
from minigpt5_core.mapper import (
    Mapper,
)

from ..common.images import fitted
from ..data.source import Shown
from ..diffusion import Backbone, Targets
from .config import StageRecipe


def picture_latents(backbone: Backbone, shows: Sequence[Shown]) -> Tensor:
    """Scaled latents of what is to be shown, at the size the diffusion model is trained with, (B, C, h, w)."""
    lacking = [one for one in shows if one.latents is None]
    fresh: Iterator[Tensor] = iter(())
    if lacking:
        pictures = [fitted(one.image(random.Random(one.seed)), backbone.side) for one in lacking]
        fresh = iter(backbone.latents(pictures))
    device = backbone.pipeline.device
    return torch.stack([next(fresh) if one.latents is None else one.latents.to(device) for one in shows])


class PictureLosses:
    """Caption alignment and diffusion loss of a batch of voken states, with classifier-free dropout.

    What is random about a picture follows from its seed, drawn on the CPU: the same on every device, and the same
    beside other pictures.
    """

    def __init__(self, recipe: StageRecipe, mapper: Mapper, targets: Targets) -> None:
        self.recipe, self.mapper, self.targets, self.backbone = recipe, mapper, targets, targets.backbone
        self.aligned = recipe.tokens == len(targets.mean)

    def counts(self, pictures: int, drawn: bool) -> dict[str, int]:
        """How many pictures each of the losses is a mean over."""
        aligned = {"caption": pictures} if self.aligned else {}
        return aligned | ({"image": pictures} if drawn else {})

    def __call__(self, states: Tensor, shows: Sequence[Shown], drawn: bool) -> dict[str, Tensor]:
        """Means over the pictures: `states` (B, V, L); with `drawn` the diffusion loss is among them."""
        if not shows:
            return {}  # a batch whose tasks ask for no picture
        generators = [torch.Generator().manual_seed(one.seed) for one in shows]
        parts = [
            drop_states(state[None], self.recipe.dropout, generator)
            for state, generator in zip(states, generators, strict=True)
        ]
        answer = self.mapper(torch.cat([kept for kept, _ in parts]).float())
        losses = {}
        if self.aligned:
            texts = ["" if gone else one.caption for (_, gone), one in zip(parts, shows, strict=True)]
            standardised = self.recipe.caption_target == "standardised"
            losses["caption"] = self.targets.loss(answer, texts, standardised)
        if drawn:
            losses["image"] = self._image(answer, shows, generators)
        return losses

    def _image(
        self, answer: Conditioning, shows: Sequence[Shown], generators: Sequence[torch.Generator]
    ) -> Tensor:
        latents = picture_latents(self.backbone, shows)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
        times = self.backbone.times(generators).to(latents.device)
        return self.backbone.loss(answer, latents, noise.to(latents.device), times, self.recipe.min_snr_gamma)
