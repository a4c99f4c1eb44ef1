"""How the frozen LLM sees: a small image encoder and projector turn a picture into a few of the LLM's own vectors.

Shape letters: B batch, H height, W width, K image tokens, L llm width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from .config import build
from .errors import BadInputError
from .weights import FORMAT_VERSION, IMAGE_ADAPTER, atomic_save, read_tensors

KEYS = ("format_version", "image_encoder", "llm", "trained")


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
        if self.size % 2 ** len(self.channels) or self.hidden % self.heads:
            raise BadInputError(
                f"Image encoder config: {len(self.channels)} convolutions halve the side of {self.size} pixels, and "
                f"{self.heads} heads share a width of {self.hidden}; both must divide evenly."
            )


@dataclass(frozen=True)
class ImageAdapterHeader:
    """Which LLM the encoder speaks to, by name, width and `hash_weights`, and how it was trained."""

    llm_id: str
    llm_width: int
    llm_hash: str
    trained: dict = field(default_factory=dict)


class ImageEncoder(nn.Module):
    """Convolutions see, K learned queries read them, a linear projector speaks: (B, 3, size, size) -> (B, K, L).

    Pictures are in [-1, 1]. A fresh one answers near `scale` in every dimension, as the LLM's embeddings are.
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


def picture_tensor(picture: Image.Image) -> Tensor:
    """(H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)


def to_square(pictures: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, size, size) in [-1, 1]: the middle square, resampled."""
    images = pictures.movedim(-1, 1).float()
    side = min(images.shape[-2:])
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    images = images[..., top : top + side, left : left + side]
    if side != size:
        images = functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return images.clamp(0, 1) * 2 - 1


def save_image_adapter(path: Path, encoder: ImageEncoder, header: ImageAdapterHeader) -> None:
    """Writes encoder and header to one safetensors file, in the encoder's dtype."""
    llm = {"id": header.llm_id, "width": header.llm_width, "hash": header.llm_hash}
    values = (int(FORMAT_VERSION), dataclasses.asdict(encoder.config), llm, header.trained)
    metadata = {
        f"minigpt5.{key}": json.dumps(value, sort_keys=True) for key, value in zip(KEYS, values, strict=True)
    }
    atomic_save(encoder.state_dict(), path, {"format": "pt"} | metadata)


def load_image_adapter(path: Path) -> tuple[ImageEncoder, ImageAdapterHeader]:
    """The image encoder in float32 and eval mode, with its header; BadInputError for any other file."""
    tensors, metadata = read_tensors(path)
    values = _header(metadata, path)
    config = build(ImageEncoderConfig, values["image_encoder"], f"{path}: minigpt5.image_encoder")
    llm = values["llm"]
    if not isinstance(llm, dict) or set(llm) != {"id", "width", "hash"} or llm["width"] != config.llm_width:
        raise BadInputError(
            f"{path}: minigpt5.llm is {llm!r}; expected id, hash and the encoder's width {config.llm_width}."
        )
    encoder = ImageEncoder(config)
    try:
        encoder.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise BadInputError(f"{path}: its tensors are not those of the header's encoder: {error}") from error
    return encoder.eval(), ImageAdapterHeader(llm["id"], llm["width"], llm["hash"], values["trained"])


def _header(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    missing = [key for key in KEYS if f"minigpt5.{key}" not in metadata]
    if missing:
        raise BadInputError(
            f"{path} is no image adapter: its header lacks minigpt5.{', minigpt5.'.join(missing)}. Give the "
            f"{IMAGE_ADAPTER} that python -m trainer image-adapter wrote."
        )
    try:
        values = {key: json.loads(metadata[f"minigpt5.{key}"]) for key in KEYS}
    except json.JSONDecodeError as error:
        raise BadInputError(f"{path}: its header is not JSON ({error}). Copy the file again.") from error
    if str(values["format_version"]) != FORMAT_VERSION:
        raise BadInputError(
            f"{path} has format version {values['format_version']}, this code reads {FORMAT_VERSION}. Update the code."
        )
    return values
