"""Mapper files: one safetensors file whose header says everything a loader needs. Nothing here unpickles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .conditioning import Space
from .config import MapperConfig, build
from .errors import BadInputError
from .mapper import Mapper, build_mapper

FORMAT_VERSION = "1"
# what an LLM sees with lies beside its weights and is none of them: our own image encoder, or the published one
IMAGE_ADAPTER, QFORMER = "image_adapter.safetensors", "qformer.safetensors"
KEYS = tuple(f"minigpt5.{name}" for name in ("format_version", "mapper", "vokens", "space", "llm", "trained"))


@dataclass(frozen=True)
class MapperHeader:
    """What a mapper belongs to: its conditioning space, the LLM it listens to, and how it was trained.

    `llm_hash` is `hash_weights` of the LLM's folder, empty where it was not known; `trained` holds stage, steps, data,
    seed, code version.
    """

    space: Space
    llm_id: str
    llm_width: int
    llm_hash: str
    trained: dict[str, Any] = field(default_factory=dict)


def save_mapper(path: Path, mapper: Mapper, header: MapperHeader) -> None:
    """Writes weights and header to `path` in the mapper's dtype. Raises BadInputError when they disagree."""
    _check_agreement(mapper.config, header, path)
    metadata = {
        "format": "pt",
        "minigpt5.format_version": FORMAT_VERSION,
        "minigpt5.mapper": _json(mapper.config.to_dict()),
        "minigpt5.vokens": str(mapper.config.vokens),
        "minigpt5.space": _json(dataclasses.asdict(header.space)),
        "minigpt5.llm": _json({"id": header.llm_id, "width": header.llm_width, "hash": header.llm_hash}),
        "minigpt5.trained": _json(header.trained),
    }
    atomic_save(mapper.state_dict(), path, metadata)


def load_mapper(path: Path) -> tuple[Mapper, MapperHeader]:
    """The mapper in float32 and eval mode, with its header; a half-precision file is widened.

    Raises BadInputError for a missing, truncated or foreign file, and for unknown keys, kinds and sizes.
    """
    tensors, metadata = read_tensors(path)
    config, header = _parse(metadata, path)
    with torch.device("meta"):
        mapper = build_mapper(config)
    _check_tensors(mapper, tensors, path)
    mapper.load_state_dict(tensors, strict=True, assign=True)
    return mapper.eval(), header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an LLM's own weights."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name not in (IMAGE_ADAPTER, QFORMER)]


def gguf_in(path: Path) -> Path | None:
    """`path` where it is a .gguf file, or the one in a folder without safetensors weights; else None."""
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 and not weight_files(path) else None


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
        with _open(file) as opened:
            names = opened.keys()
            marks |= {name: _mark(opened, name) for name in names}
    digest = hashlib.sha256()
    for name in sorted(marks):
        digest.update(name.encode() + b"\0" + marks[name])
    return digest.hexdigest()


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error}. Check the path.") from error
    except SafetensorError as error:
        raise BadInputError(
            f"{path} is not a whole safetensors file ({error}). It may be cut short: copy it again."
        ) from error


def read_tensors(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file in `dtype`, and its metadata; BadInputError for any other file."""
    with _open(path) as opened:
        names = opened.keys()
        # copies: a mapped tensor would hold the file open
        tensors = {name: opened.get_tensor(name).to(dtype, copy=True) for name in names}
        return tensors, opened.metadata() or {}


def _parse(metadata: dict[str, str], path: Path) -> tuple[MapperConfig, MapperHeader]:
    known = f"Known keys: {', '.join(KEYS)}."
    if missing := set(KEYS) - set(metadata):
        raise BadInputError(f"{path} is not a mapper: its header lacks {', '.join(sorted(missing))}. {known}")
    if unknown := set(metadata) - set(KEYS) - {"format"}:
        raise BadInputError(f"{path}: unknown header key {', '.join(sorted(unknown))}. {known}")
    if metadata["minigpt5.format_version"] != FORMAT_VERSION:
        found = metadata["minigpt5.format_version"]
        raise BadInputError(
            f"{path} has format version {found}, this code reads {FORMAT_VERSION}. Update the code."
        )
    config = MapperConfig.from_dict(_decode(metadata, "minigpt5.mapper", path))
    header = _build_header(metadata, path)
    _check_agreement(config, header, path)
    if metadata["minigpt5.vokens"] != str(config.vokens):
        found = metadata["minigpt5.vokens"]
        raise BadInputError(f"{path}: minigpt5.vokens is {found}, minigpt5.mapper says {config.vokens}.")
    return config, header


@dataclass(frozen=True)
class _LLM:
    id: str
    width: int
    hash: str


def _build_header(metadata: dict[str, str], path: Path) -> MapperHeader:
    space = build(Space, _decode(metadata, "minigpt5.space", path), f"{path}: minigpt5.space")
    llm = build(_LLM, _decode(metadata, "minigpt5.llm", path), f"{path}: minigpt5.llm")
    trained = _decode(metadata, "minigpt5.trained", path)
    return MapperHeader(space, llm.id, llm.width, llm.hash, trained)


def _check_agreement(config: MapperConfig, header: MapperHeader, path: Path) -> None:
    space = header.space
    pairs = {
        "tokens": (config.tokens, space.tokens),
        "width": (config.width, space.width),
        "pooled width": (config.pooled_width, space.pooled_width),
        "LLM width": (config.llm_width, header.llm_width),
    }
    for name, (mapper_side, header_side) in pairs.items():
        if mapper_side != header_side:
            raise BadInputError(
                f"{path}: the mapper's {name} is {mapper_side}, its header says {header_side} "
                f"(space {space.name}, LLM {header.llm_id}). Build the mapper for that space and LLM."
            )


def _check_tensors(mapper: Mapper, tensors: dict[str, torch.Tensor], path: Path) -> None:
    trouble = f"{path}: the tensors do not fit a {mapper.config.kind} mapper of the header's sizes"
    check_shapes(mapper, tensors, trouble, "Save the mapper again.")


def check_shapes(module: nn.Module, tensors: dict[str, torch.Tensor], trouble: str, cure: str) -> None:
    """BadInputError unless the tensors have the names and shapes of the module's own; either may be on `meta`.

    It says how many differ, after `trouble`, then what is wrong with the first one, then `cure`.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if strays := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        first = strays[0]
        raise BadInputError(
            f"{trouble}: {len(strays)} differ; {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'no such tensor')}. {cure}"
        )


def _mark(opened: Any, name: str, rows: int = 8) -> bytes:
    part = opened.get_slice(name)
    shape = part.get_shape()
    label = f"{part.get_dtype()} {shape}".encode()
    ends = [opened.get_tensor(name)] if len(shape) < 2 else [part[:rows], part[max(0, shape[0] - rows) :]]
    return label + b"".join(end.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for end in ends)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _decode(metadata: dict[str, str], key: str, path: Path) -> Any:
    try:
        value = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise BadInputError(f"{path}: {key} is not JSON ({error}). Save the mapper again.") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: {key} is {value!r}, expected an object.")
    return value
