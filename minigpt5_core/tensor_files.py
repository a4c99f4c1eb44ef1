"""safetensors files read and written whole. Nothing here unpickles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import BadInputError

FORMAT_VERSION = "1"


def atomic_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside `path` and moves it into place, so a reader never sees half a file.

    The same tensors and metadata give the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata
        )
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


def read_tensors(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file in `dtype`, and its metadata; BadInputError for any other file."""
    with open_tensors(path) as opened:
        names = opened.keys()
        # copies: a mapped tensor would hold the file open
        tensors = {name: opened.get_tensor(name).to(dtype, copy=True) for name in names}
        return tensors, opened.metadata() or {}


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
