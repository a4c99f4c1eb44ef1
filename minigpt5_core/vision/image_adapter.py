"""The file of an image encoder: one safetensors file whose header says which LLM it was trained for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import build
from ..errors import BadInputError
from ..tensor_files import FORMAT_VERSION, atomic_save, check_shapes, read_tensors
from ..texts import parse_json
from .encoder import ImageEncoder, ImageEncoderConfig

# image encoders that lie in an LLM's folder beside its own weights: ours, and the published model's
IMAGE_ADAPTER, QFORMER = "image_adapter.safetensors", "qformer.safetensors"
KEYS = ("format_version", "image_encoder", "llm", "trained")


@dataclass(frozen=True)
class ImageAdapterHeader:
    """Which LLM the encoder was trained for, by name, width and `hash_weights`, and how it was trained."""

    llm_id: str
    llm_width: int
    llm_hash: str
    trained: dict = field(default_factory=dict)


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
    with torch.device("meta"):  # nothing is made of sizes that the tensors do not have
        encoder = ImageEncoder(config)
    trouble = f"{path}: its tensors are not those of the header's encoder"
    check_shapes(encoder, tensors, trouble, "Copy the file again.")
    encoder.to_empty(device="cpu").load_state_dict(tensors, strict=True)
    return encoder.eval(), ImageAdapterHeader(llm["id"], llm["width"], llm["hash"], values["trained"])


def _header(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    missing = [key for key in KEYS if f"minigpt5.{key}" not in metadata]
    if missing:
        raise BadInputError(
            f"{path} is no image adapter: its header lacks minigpt5.{', minigpt5.'.join(missing)}. Give the "
            f"{IMAGE_ADAPTER} that python -m trainer image-adapter wrote."
        )
    try:
        values = {key: parse_json(metadata[f"minigpt5.{key}"]) for key in KEYS}
    except ValueError as error:
        raise BadInputError(f"{path}: its header is not JSON ({error}). Copy the file again.") from error
    if str(values["format_version"]) != FORMAT_VERSION:
        raise BadInputError(
            f"{path} has format version {values['format_version']}, this code reads {FORMAT_VERSION}. Update the code."
        )
    return values
