"""What the mapper should answer."""

from collections.abc import Sequence

from torch import Tensor

from minigpt5_core.conditioning import Conditioning, Space
from minigpt5_core.conditioning.fit import answer_loss
from minigpt5_core.diffusion import space_of, space_of_widths
from minigpt5_core.losses import Statistics

from .base import FrozenDiffusion


class TextTargets:
    """What the mapper should answer: the text encoders on the full caption; and their spread over many captions."""

    def __init__(self, diffusion: FrozenDiffusion, captions: Sequence[str]) -> None:
        self.diffusion = diffusion
        tokens, pooled = Statistics(smallest=1e-2), Statistics(smallest=1e-2)
        for first in range(0, len(captions), 64):
            answer = diffusion.encode(captions[first : first + 64])
            tokens.add(answer.tokens)
            if answer.pooled is not None:
                pooled.add(answer.pooled[:, None])
        self.mean, self.std = tokens.mean, tokens.std
        self.pooled_std = pooled.std if diffusion.pools else None

    def space(self, default: Space) -> Space:
        """What the diffusion model takes; of one that does not draw, what its text encoders answer."""
        pipeline = self.diffusion.pipeline
        if self.diffusion.draws:
            return space_of(pipeline, default)
        widths = self.mean.shape[-1], None if self.pooled_std is None else self.pooled_std.shape[-1]
        return space_of_widths(widths, default, type(pipeline).__name__)

    def loss(self, answer: Conditioning, texts: Sequence[str], standardised: bool) -> Tensor:
        """The distance of the mapper's answer from theirs, tokens and pooled counted alike."""
        scales = (self.std, self.pooled_std) if standardised else (None, None)
        return answer_loss(answer, self.diffusion.encode(texts), *scales)
