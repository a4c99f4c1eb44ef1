"""Vicuna, EVA's ViT, BLIP-2's Q-Former and MiniGPT-4's projection (arXiv 2304.10592) as one folder of an LLM that sees.

The folder is Hugging Face's for the LLM, with a fast tokenizer; what it sees with lies in it as qformer.safetensors.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt5_core.errors import BadInputError
from minigpt5_core.files import whole_folder
from minigpt5_core.published import PublishedTokenizer
from minigpt5_core.reading import reading
from minigpt5_core.tensor_files import check_shapes
from minigpt5_core.vision.image_adapter import QFORMER
from minigpt5_core.vision.qformer import QFormerConfig, build_qformer, header

from .pickles import read_folder, read_tensors
from .report import Report
from .tokenizer import fast_tokenizer
from .vision import read_source, vision_config, vision_tensors
from .written import save_checked

TOKENIZER = "tokenizer.model"
SHARD = 2 * 10**9  # bytes, which is also what is held in memory at a time


@dataclass(frozen=True)
class Sources:
    """What the LLM and its sight come from: folders and files."""

    vicuna: Path
    vit: Path
    qformer: Path
    projection: Path


@dataclass(frozen=True)
class Sizes:
    """What no tensor shows, with the published values."""

    vit_heads: int = 16
    qformer_heads: int = 12
    vokens: int = 8


@dataclass(frozen=True)
class SeeingLLM:
    """The LLM's and the vision path's tensors under Hugging Face's and our names."""

    config: LlamaConfig
    llm: dict[str, Tensor]
    vision_config: QFormerConfig
    vision: dict[str, Tensor]
    report: Report


def convert_minigpt4(
    sources: Sources, out: Path, sizes: Sizes | None = None, dry_run: bool = False
) -> SeeingLLM:
    """Writes the folder `out`; BadInputError for files that do not fit each other. Nothing is guessed."""
    sizes = sizes or Sizes()
    config = _read_config(sources.vicuna)
    tokenizer = sources.vicuna / TOKENIZER
    vocabulary = PublishedTokenizer(tokenizer, sizes.vokens).pieces.get_piece_size()
    found = convert_parts(
        config,
        vocabulary,
        read_folder(sources.vicuna),
        read_source(sources.vit),
        read_source(sources.qformer),
        read_tensors(sources.projection, "model"),
        sizes,
    )
    if not dry_run:
        with whole_folder(out) as draft:
            fast_tokenizer(tokenizer, sizes.vokens, config.max_position_embeddings).save_pretrained(draft)
            _write(found, draft)
    return found


def convert_parts(
    config: LlamaConfig,
    vocabulary: int,
    vicuna: dict[str, Tensor],
    vit: dict[str, Tensor],
    qformer: dict[str, Tensor],
    projection: dict[str, Tensor],
    sizes: Sizes,
) -> SeeingLLM:
    """The parts under our names, checked against the classes that will hold them; works on meta tensors too."""
    report = Report()
    llm = _llm(config, vocabulary, vicuna, sizes.vokens, report)
    vision = vision_tensors(vit, qformer, report) | _projector(projection, config.hidden_size, report)
    sizes_found = vision_config(vision, config.hidden_size, sizes.vit_heads, sizes.qformer_heads)
    build_qformer(sizes_found, vision, "--vit, --qformer and --projection")
    return SeeingLLM(config, llm, sizes_found, vision, report)


def _read_config(folder: Path) -> LlamaConfig:
    if not (folder / "config.json").is_file():
        raise BadInputError(f"--vicuna {folder} has no config.json. Give Vicuna's Hugging Face folder.")
    with reading(f"The LLM in {folder} cannot be read", folder):
        config = LlamaConfig.from_pretrained(folder, local_files_only=True)
    if config.tie_word_embeddings:
        raise BadInputError(f"--vicuna {folder} has one matrix for embedding and head, which no Vicuna has.")
    return config


def _llm(
    config: LlamaConfig, vocabulary: int, vicuna: dict[str, Tensor], vokens: int, report: Report
) -> dict[str, Tensor]:
    """Vicuna's tensors with rows behind its vocabulary; `config` gets the new size."""
    # files of that time also carry the rotary table, which is computed from the config
    rotary = {name for name in vicuna if name.endswith("rotary_emb.inv_freq")}
    tensors = {name: tensor for name, tensor in vicuna.items() if name not in rotary}
    _check_llm(config, tensors)
    if len(tensors["lm_head.weight"]) > vocabulary:
        report.notes["behind the vocabulary"] = "Vicuna's padding row is replaced, as the published code did"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = _extended(tensors[name], vocabulary, vokens + 1, name)
    config.vocab_size = len(tensors["lm_head.weight"])
    report.used |= {f"vicuna: {name}": f"model: {name}" for name in tensors}
    report.left_over |= {f"vicuna: {name}": "computed from the config" for name in sorted(rotary)}
    return tensors


def _check_llm(config: LlamaConfig, tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    check_shapes(
        model, tensors, "--vicuna: the tensors are not as its config.json says", "Is the folder whole?"
    )


def _extended(table: Tensor, vocabulary: int, added: int, name: str) -> Tensor:
    """The rows of the vocabulary, and `added` new ones, each their mean, as the published code began them."""
    if len(table) - vocabulary not in (0, 1):  # one more is the padding token of LLaMA's first tunings
        raise BadInputError(
            f"--vicuna: {name} has {len(table)} rows, but {TOKENIZER} beside it has a vocabulary of {vocabulary}. Give "
            "the tokenizer that belongs to these weights."
        )
    known = table[:vocabulary]
    mean = known.mean(0, dtype=torch.float32).to(table.dtype)
    return torch.cat((known, mean.expand(added, -1)))


def _projector(tensors: dict[str, Tensor], width: int, report: Report) -> dict[str, Tensor]:
    names = {f"llama_proj.{part}": f"projector.{part}" for part in ("weight", "bias")}
    if missing := sorted(set(names) - set(tensors)):
        raise BadInputError(
            f"--projection lacks {', '.join(missing)}. Give MiniGPT-4's checkpoint, such as prerained_minigpt4_7b.pth."
        )
    found = tensors["llama_proj.weight"]
    if len(found) != width:
        raise BadInputError(
            f"--projection leads into an LLM of width {len(found)}, but --vicuna is {width} wide (7B: 4096, 13B: "
            "5120). Give the projection of that size of Vicuna."
        )
    report.used |= {f"projection: {name}": f"{QFORMER}: {ours}" for name, ours in names.items()}
    rest = sorted(set(tensors) - set(names))
    report.left_over |= {f"projection: {name}": "no part of the picture's way" for name in rest}
    return {ours: tensors[name] for name, ours in names.items()}


def _write(found: SeeingLLM, draft: Path) -> None:
    config = found.config
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = found.llm["lm_head.weight"].dtype
    config.save_pretrained(draft)
    shards = split_torch_state_dict_into_shards(
        found.llm, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    for file, names in shards.filename_to_tensors.items():
        save_checked({name: found.llm[name] for name in names}, draft / file, {})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    save_checked(found.vision, draft / QFORMER, header(found.vision_config))
    found.report.write(draft)
