"""Tensors written to a safetensors file and read back."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.tensor_files import atomic_save


def save_checked(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; BadInputError unless it reads back bit by bit."""
    atomic_save(tensors, path, {"format": "pt"} | metadata)
    check_file(path, tensors)


def check_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """BadInputError unless the file holds just these tensors, bit by bit."""
    with safe_open(path, framework="pt") as opened:
        names = set(opened.keys())
        wrong = names ^ set(tensors)
        wrong |= {name for name in names & set(tensors) if not _same(opened.get_tensor(name), tensors[name])}
    if wrong:
        raise BadInputError(
            f"{path.name} does not read back as it was written ({min(wrong)} differs). Check the disk, and convert "
            "again."
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)))
