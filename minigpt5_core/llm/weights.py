"""Which files of a folder are an LLM's own weights, and a hash that tells one LLM from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInputError
from ..tensor_files import open_tensors
from ..texts import read_json
from ..vision.image_adapter import IMAGE_ADAPTER, QFORMER

DTYPES = ("torch_dtype", "dtype")  # older and newer names; a part of the model may say it itself


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an LLM's own weights."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    return [file for file in files if file.name not in (IMAGE_ADAPTER, QFORMER)]


def gguf_in(path: Path) -> Path | None:
    """`path` where it is a .gguf file, or the one in a folder without safetensors weights; else None."""
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    found = sorted(path.glob("[!.]*.gguf"))
    return found[0] if len(found) == 1 and not weight_files(path) else None


def is_for_float16(folder: Path) -> bool:
    """Whether an LLM's config.json says that its weights are float16: numbers of any other may be too large for it."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # a GGUF file, which does not say
        return False
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    said = [part[name] for part in parts if isinstance(part, dict) for name in DTYPES if name in part]
    return bool(said) and said[-1] in ("float16", "torch.float16")


def hash_weights(folder: Path) -> str:
    """A sha256 that tells one LLM from another: every tensor's name, dtype, shape, first and last rows.

    Independent of how the folder is split into files, and cheap for large models. Of a GGUF file, or the one in
    `folder`, it is the sha256 of all its bytes. Raises BadInputError when `folder` holds neither.
    """
    folder = Path(folder)
    if file := gguf_in(folder):
        if not file.is_file():
            raise BadInputError(f"There is no file {file}. Give a GGUF file, or a Hugging Face model folder.")
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    files = weight_files(folder)
    if not files:
        raise BadInputError(f"{folder} holds no .safetensors weights. Give a Hugging Face model folder.")
    marks: dict[str, bytes] = {}
    for file in files:
        with open_tensors(file) as opened:
            names = opened.keys()
            marks |= {name: _mark(opened, name) for name in names}
    digest = hashlib.sha256()
    for name in sorted(marks):
        digest.update(name.encode() + b"\0" + marks[name])
    return digest.hexdigest()


def _mark(opened: Any, name: str, rows: int = 8) -> bytes:
    part = opened.get_slice(name)
    shape = part.get_shape()
    label = f"{part.get_dtype()} {shape}".encode()
    ends = [opened.get_tensor(name)] if len(shape) < 2 else [part[:rows], part[max(0, shape[0] - rows) :]]
    return label + b"".join(end.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for end in ends)
