"""Vision for a text-only LLM: a small image encoder and projector turn a picture into a few of its input vectors.

Shape letters: B batch, H height, W width, K image tokens, L llm width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import BadInputError
from ..sizes import check_sizes
from .pictures import to_square


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Everything that rebuilds an image encoder: a square of `size` pixels -> `tokens` vectors of the LLM's width.

    `channels` are those of the convolutions, each of which halves the side.
    """

    llm_width: int
    size: int = 128
    tokens: int = 16
    channels: list = field(default_factory=lambda: [24, 48, 96, 128])
    hidden: int = 192
    heads: int = 6
    layers: int = 2

    def __post_init__(self) -> None:
        numbers = [
            self.llm_width,
            self.size,
            self.tokens,
            self.hidden,
            self.heads,
            self.layers,
            *self.channels,
        ]
        if not self.channels or any(type(number) is not int or number < 1 for number in numbers):
            raise BadInputError(f"Image encoder config: {self}; every size must be a whole number from 1 on.")
        check_sizes(vars(self), "Image encoder config")
        if self.size % 2 ** len(self.channels) or self.hidden % self.heads:
            raise BadInputError(
                f"Image encoder config: {len(self.channels)} convolutions halve the side of {self.size} pixels, and "
                f"{self.heads} heads share a width of {self.hidden}; both must divide evenly."
            )


class ImageEncoder(nn.Module):
    """Convolutions, K learned queries that cross-attend to them, a projector: (B, 3, size, size) -> (B, K, L).

    Pictures are in [-1, 1]. `mean` and `scale` (L,) are those of the LLM's embeddings, and bring the output to them.
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.convolutions = nn.Sequential(*_convolutions(config.channels))
        cells = (config.size // 2 ** len(config.channels)) ** 2
        self.input = nn.Linear(config.channels[-1], hidden)
        self.positions = nn.Parameter(torch.randn(1, cells, hidden) * 0.3)
        self.queries = nn.Parameter(torch.randn(1, config.tokens, hidden))
        layer = nn.TransformerDecoderLayer(
            hidden, config.heads, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(hidden))
        self.projector = nn.Linear(hidden, config.llm_width)
        self.register_buffer("mean", torch.zeros(config.llm_width))
        self.register_buffer("scale", torch.ones(config.llm_width))

    def prepare(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> what `forward` takes."""
        return to_square(pictures, self.config.size)

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.convolutions(pictures).flatten(2).transpose(1, 2)  # (B, cells, channels)
        memory = self.input(seen) + self.positions
        read = self.reader(self.queries.expand(len(pictures), -1, -1), memory)
        return self.projector(read) * self.scale + self.mean


def _convolutions(channels: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise([3, *channels])):
        kernel = 3 if index else 5
        layers += [
            nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return layers
