"""Mapper files: one safetensors file whose header says everything a loader needs. Nothing here unpickles."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import MapperConfig, build
from ..errors import BadInputError
from ..tensor_files import FORMAT_VERSION, HASH, atomic_save, check_shapes, read_tensors
from ..texts import parse_json
from .mapper import Mapper, build_mapper
from .spaces import Space

KEYS = tuple(f"minigpt5.{name}" for name in ("format_version", "mapper", "vokens", "space", "llm", "trained"))


@dataclass(frozen=True)
class MapperHeader:
    """What a mapper belongs to: its conditioning space, the LLM whose states it reads, and how it was trained.

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


def _parse(metadata: dict[str, str], path: Path) -> tuple[MapperConfig, MapperHeader]:
    known = f"Known keys: {', '.join(KEYS)}."
    if missing := set(KEYS) - set(metadata):
        raise BadInputError(f"{path} is not a mapper: its header lacks {', '.join(sorted(missing))}. {known}")
    if unknown := set(metadata) - set(KEYS) - {"format", HASH}:
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


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _decode(metadata: dict[str, str], key: str, path: Path) -> Any:
    try:
        value = parse_json(metadata[key])
    except ValueError as error:
        raise BadInputError(f"{path}: {key} is not JSON ({error}). Save the mapper again.") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: {key} is {value!r}, expected an object.")
    return value
