"""The published model's vision: EVA ViT, Q-Former (arXiv 2301.12597) and MiniGPT-4's projection (arXiv 2304.10592).

Used in place of an ImageEncoder. Shape letters: B batch, H height, W width, K query tokens, L llm width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from ..config import build
from ..errors import BadInputError
from ..sizes import check_sizes
from ..tensor_files import FORMAT_VERSION, check_shapes, read_tensors
from ..texts import parse_json
from .pictures import picture_tensor

# CLIP's, which EVA was trained with
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BLOCK_EPS, LAST_EPS = (
    1e-6,
    1e-5,
)  # of the ViT's LayerNorms; the last one is LAVIS's own and has torch's default


@dataclass(frozen=True)
class QFormerConfig:
    """Everything that rebuilds it: a square of `size` pixels -> `queries` vectors of the LLM's width.

    `vision_` are the ViT's sizes, the rest the Q-Former's; every `cross_every`th of its layers attends to the picture.
    Raises BadInputError for sizes that cannot be built.
    """

    llm_width: int
    size: int
    patch: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    queries: int
    width: int
    hidden: int
    layers: int
    heads: int
    cross_every: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise BadInputError(f"Vision config: {self}; every size must be 1 or more.")
        check_sizes(vars(self), "Vision config")
        for width, heads in ((self.vision_width, self.vision_heads), (self.width, self.heads)):
            if width % heads:
                raise BadInputError(
                    f"Vision config: a width of {width} cannot be split over {heads} heads; give the number of heads "
                    "that the model was trained with."
                )


class QFormerEncoder(nn.Module):
    """Normalised pictures (B, 3, size, size) -> (B, K, L)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = Blip2VisionModel(_vision_config(config))
        self.vision_model.post_layernorm.eps = LAST_EPS
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, config.width))
        self.qformer = Blip2QFormerModel(_qformer_config(config))
        self.projector = nn.Linear(config.width, config.llm_width)

    def prepare(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 3, size, size): the middle square of the shorter side, in CLIP's scale."""
        return torch.stack([normalise(_middle(picture, self.config.size)) for picture in pictures])

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.vision_model(pixel_values=pictures).last_hidden_state  # (B, patches + 1, vision width)
        queries = self.query_tokens.expand(len(pictures), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return self.projector(read.to(self.projector.weight))


def normalise(picture: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1] -> (3, H, W) standardised with CLIP's mean and standard deviation."""
    return ((picture - picture.new_tensor(MEAN)) / picture.new_tensor(STD)).movedim(-1, 0)


def _middle(picture: Tensor, size: int) -> Tensor:
    """(H, W, 3) in [0, 1] -> (size, size, 3): in 8 bits, by Pillow, as published."""
    image = Image.fromarray((picture.cpu() * 255).round().clamp(0, 255).numpy().astype(np.uint8))
    short, long = sorted(image.size)
    long = int(size * long / short)
    image = image.resize(
        (size, long) if image.width <= image.height else (long, size), Image.Resampling.BILINEAR
    )
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return picture_tensor(image.crop((left, top, left + size, top + size)))


def header(config: QFormerConfig) -> dict[str, str]:
    """The metadata of its file."""
    sizes = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return {"minigpt5.format_version": FORMAT_VERSION, "minigpt5.qformer": sizes}


def load_qformer(path: Path, dtype: torch.dtype = torch.float32) -> QFormerEncoder:
    """The encoder in `dtype` and eval mode; BadInputError for any other file."""
    tensors, metadata = read_tensors(path, dtype)
    found = metadata.get("minigpt5.format_version")
    if found != FORMAT_VERSION or "minigpt5.qformer" not in metadata:
        raise BadInputError(
            f"{path} has format version {found}, expected {FORMAT_VERSION} and the key minigpt5.qformer. Give the file "
            "that python -m trainer convert minigpt4 wrote."
        )
    try:
        values = parse_json(metadata["minigpt5.qformer"])
    except ValueError as error:
        raise BadInputError(f"{path}: its header is not JSON ({error}). Copy the file again.") from error
    config = build(QFormerConfig, values, f"{path}: minigpt5.qformer")
    return build_qformer(config, tensors, str(path))


def build_qformer(config: QFormerConfig, tensors: dict[str, Tensor], source: str) -> QFormerEncoder:
    """The encoder around these tensors, in eval mode; BadInputError, opened by `source`, if they are not its own."""
    with torch.device("meta"):
        encoder = QFormerEncoder(config)
    trouble = f"{source}: the tensors of the vision path are not as they should be"
    check_shapes(encoder, tensors, trouble, "Is the file whole?")
    encoder.load_state_dict(tensors, strict=True, assign=True)
    return encoder.requires_grad_(False).eval()


def _vision_config(config: QFormerConfig) -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_hidden,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.size,
        patch_size=config.patch,
        layer_norm_eps=BLOCK_EPS,
    )


def _qformer_config(config: QFormerConfig) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        cross_attention_frequency=config.cross_every,
        encoder_hidden_size=config.vision_width,
        layer_norm_eps=1e-12,
        use_qformer_text_input=False,
    )
