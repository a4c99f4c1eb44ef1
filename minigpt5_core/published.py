"""The published MiniGPT-5 checkpoints in our classes: their words cut into ids, their weights under our names.

A published checkpoint is a dict of tensors that the caller has read from its pickle: nothing here unpickles.
Layouts and segmentation: github.com/UCSB-AI/MiniGPT-5 (arXiv 2310.02239), written for transformers 4.31.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from .conditioning.mapper import ReferenceMapper
from .config import MapperConfig
from .errors import BadInputError
from .tensor_files import check_shapes
from .vokens import IMAGE_HERE, voken_strings

_MAPPER_NAMES = {"fc.": "fc.", "llm_to_t2i_mapping.": "transformer.", "t2i_decoder_prompt": "queries"}
_LLM_PREFIX = re.compile(r"^model\.llama_model\.(base_model\.model\.)?")


class PublishedTokenizer:
    """The slow LLaMA tokenizer as transformers 4.31 used it, straight on its sentencepiece file.

    Text is split at the special tokens, stripped of white space beside the added ones, and every piece is encoded
    on its own, with its own leading "_". Added after the file's vocabulary: the vokens, then `<ImageHere>`.
    Raises BadInputError when the file is no sentencepiece model.
    """

    def __init__(self, file: Path, vokens: int = 8) -> None:
        try:
            self.pieces = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise BadInputError(f"{file} is no sentencepiece model; give LLaMA's tokenizer.model.") from error
        size = self.pieces.get_piece_size()
        added = [*voken_strings(vokens), IMAGE_HERE]
        own = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        self.added = {name: size + index for index, name in enumerate(added)}
        self.special = {self.pieces.id_to_piece(index): index for index in own if index >= 0} | self.added
        self.voken_ids = [self.added[name] for name in voken_strings(vokens)]
        self.image_id = self.added[IMAGE_HERE]
        self.eos_token_id = self.pieces.eos_id()
        self._boundary = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may hold special tokens; none is added."""
        parts = self._boundary.split(text)  # text, special, text, special, ..., text
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self.special[part])
            elif part := self._strip(part, parts[index - 1 : index], parts[index + 1 : index + 2]):
                ids += self.pieces.encode(part)
        return ids

    def _strip(self, text: str, before: list[str], after: list[str]) -> str:
        if before and before[0] in self.added:
            text = text.lstrip()
        return text.rstrip() if after and after[0] in self.added else text


@dataclass(frozen=True)
class PublishedWeights:
    """A checkpoint's tensors under our names: the mapper's, and those that replace the base LLM's."""

    mapper: dict[str, Tensor]
    llm: dict[str, Tensor]

    def over(self, earlier: PublishedWeights) -> PublishedWeights:
        """This (stage 2) checkpoint with what it lacks, projection and queries, from an earlier (stage 1) one."""
        return PublishedWeights(earlier.mapper | self.mapper, earlier.llm | self.llm)


def our_name(published: str) -> tuple[str, str]:
    """("mapper" or "llm", our parameter's name) of a tensor in a published checkpoint; BadInputError if unknown."""
    for theirs, ours in _MAPPER_NAMES.items():
        if published.startswith(theirs):
            return "mapper", ours + published.removeprefix(theirs)
    if match := _LLM_PREFIX.match(published):
        return "llm", published[match.end() :].replace(".modules_to_save.default", "")
    raise BadInputError(
        f"Unknown tensor {published!r} in the checkpoint. Known beginnings: model.llama_model., "
        f"{', '.join(_MAPPER_NAMES)}. Is this a MiniGPT-5 checkpoint?"
    )


def read_published(checkpoint: dict[str, Tensor]) -> PublishedWeights:
    """A published checkpoint's `state_dict` under our names."""
    weights = PublishedWeights({}, {})
    for published, tensor in checkpoint.items():
        side, name = our_name(published)
        (weights.mapper if side == "mapper" else weights.llm)[name] = tensor
    return weights


def build_published_mapper(weights: PublishedWeights, heads: int = 8, vokens: int = 8) -> ReferenceMapper:
    """The reference mapper with the checkpoint's weights, all sizes but the head count read off them."""
    missing = {"queries", "fc.0.weight", "transformer.encoder.layers.0.linear1.weight"} - set(weights.mapper)
    if missing:
        raise BadInputError(
            f"The checkpoint lacks the mapper's {', '.join(sorted(missing))}. A stage-2 checkpoint needs the "
            "stage-1 checkpoint it was trained from: give both."
        )
    _, tokens, width = weights.mapper["queries"].shape
    layers = {name.split(".")[3] for name in weights.mapper if name.startswith("transformer.encoder.layers.")}
    config = MapperConfig(
        kind="reference",
        vokens=vokens,
        llm_width=weights.mapper["fc.0.weight"].shape[1],
        tokens=tokens,
        width=width,
        hidden=width,
        heads=heads,
        layers=len(layers),
        feed_forward=len(weights.mapper["transformer.encoder.layers.0.linear1.weight"]),
    )
    with torch.device("meta"):
        mapper = ReferenceMapper(config)
    _load(mapper, weights.mapper)
    return mapper.eval()


def _load(mapper: nn.Module, tensors: dict[str, Tensor]) -> None:
    check_shapes(
        mapper,
        tensors,
        "The checkpoint's tensors are not those of the mapper",
        "Do the files belong together, and is each whole?",
    )
    mapper.load_state_dict(tensors, strict=True, assign=True)
