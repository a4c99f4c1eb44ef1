"""Conditioning spaces: the shapes that diffusion models take in place of their text encoders' output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadInputError

if TYPE_CHECKING:  # the table of families is plain data: reading it must not cost an import of torch
    import torch


@dataclass(frozen=True)
class Space:
    """Conditioning of shape (B, tokens, width) and, where `pooled_width` is set, (B, pooled_width).

    `latent_channels` are those of the family's latents, to tell models apart that take the same conditioning; 0 where
    nothing is known of them.
    """

    name: str
    tokens: int
    width: int
    pooled_width: int | None = None
    latent_channels: int = 4

    def __str__(self) -> str:
        pooled = f" with a pooled vector of {self.pooled_width}" if self.pooled_width else ""
        return f"{self.name} ({self.tokens} x {self.width}{pooled})"


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What steers the sampler: tokens (B, T, C) and pooled (B, P), None where the space has none."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same in another precision."""
        return Conditioning(self.tokens.to(dtype), None if self.pooled is None else self.pooled.to(dtype))


def check_space(found: Space, expected: Space) -> None:
    """Raises BadInputError naming both sides when conditioning of `found` cannot feed a model of `expected`.

    The number of tokens is free: cross-attention takes any length.
    """
    if (found.width, found.pooled_width) != (expected.width, expected.pooled_width):
        raise BadInputError(
            f"The mapper answers in the space {found}, but the diffusion model expects {expected}. "
            f"Use a mapper trained for {expected.name}, or a diffusion model of the space {found.name}."
        )
