"""safetensors files read and written whole. Nothing here unpickles.

What we write holds a hash of its tensors, and is refused when they are not those any more: a byte that a disk or a
download has changed is still a number, and would spoil every story without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import BadInputError

FORMAT_VERSION = "1"
HASH = "minigpt5.hash"  # in the header: `hash_tensors` of what was written


def atomic_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside `path` and moves it into place, so a reader never sees half a file.

    The header holds `metadata` and the tensors' hash. The same tensors and metadata give the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, temporary, metadata | {HASH: hash_tensors(plain)})
        _sort_header(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sort_header(path: Path) -> None:
    """safetensors writes the metadata's keys in another order every time; this puts them in one, in place."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # longer only if safetensors' JSON changes: then the order stays as it came
            file.seek(8)
            file.write(text.ljust(length))


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """A sha256 of all names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sign(path: Path) -> None:
    """Writes the hash of its tensors into the header of a file that a library has written."""
    tensors, metadata = read_whole(path)
    atomic_save(tensors, path, {name: value for name, value in metadata.items() if name != HASH})


def read_tensors(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`read_whole`, in `dtype`."""
    tensors, metadata = read_whole(path)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, metadata


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, as they are, and its metadata.

    BadInputError for any other file, for tensors that are not those of the header's hash (where it has one), and for
    numbers that are none.
    """
    with open_tensors(path) as opened:
        # copies: a mapped tensor would hold the file open
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    if HASH in metadata and metadata[HASH] != hash_tensors(tensors):
        raise BadInputError(
            f"{path} is damaged: its tensors are not those that were written (by the hash in its header). Copy the "
            "file again."
        )
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise BadInputError(
                f"{path} is damaged, or what made it went wrong: {name} holds NaN or infinite numbers. Copy the file "
                "again, or train with lower rates."
            )
    return tensors, metadata


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all its numbers are some, in one pass and no memory; whole numbers and 8-bit floats always pass."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    return all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor)).tolist())


def check_finite(module: nn.Module, trouble: str) -> None:
    """BadInputError, opened by `trouble`, for a model whose weights are no numbers."""
    for name, weight in module.state_dict().items():
        if not weight.is_meta and not is_finite(weight):
            raise BadInputError(f"{trouble}: {name} holds NaN or infinite numbers. Copy the files again.")


def open_tensors(path: Path) -> Any:
    """The open safetensors file, for reading parts of it; BadInputError for any other file."""
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error}. Check the path.") from error
    except SafetensorError as error:
        raise BadInputError(
            f"{path} is not a whole safetensors file ({error}). It may be cut short: copy it again."
        ) from error


def check_shapes(module: nn.Module, tensors: dict[str, torch.Tensor], trouble: str, cure: str) -> None:
    """BadInputError unless the tensors have the names and shapes of the module's own; either may be on `meta`.

    The message is `trouble`, how many differ, what is wrong with the first one, and `cure`.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if strays := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        first = strays[0]
        raise BadInputError(
            f"{trouble}: {len(strays)} differ; {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'no such tensor')}. {cure}"
        )
