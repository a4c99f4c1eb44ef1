"""The published MiniGPT-5 checkpoints (arXiv 2310.02239) into `mapper.safetensors` and a PEFT adapter.

Both stages saved what they trained. Stage 2 is laid over stage 1: mapper, embedding and head are the later ones, the
projection and the queries come from stage 1, LoRA from stage 2. The embedding and the head are taken whole, because
weight decay moved every row of them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minigpt5_core.conditioning import SPACES, Space
from minigpt5_core.conditioning.mapper import ReferenceMapper
from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.files import whole_folder
from minigpt5_core.llm.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BOS_ID,
    NO_LORA,
    PREFIX,
    VOKEN_IDS,
    read_adapter,
)
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.own_code import check_folder, forget_code
from minigpt5_core.published import PublishedWeights, build_published_mapper, our_name, read_published
from minigpt5_core.reading import reading
from minigpt5_core.vokens import voken_strings

from .pickles import read_tensors
from .report import Report
from .written import check_file, save_checked

MAPPER, ADAPTER = "mapper.safetensors", "adapter"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# The published files: bytes, beginning and end of their sha256, and the id their prompts began with. Until March 2024
# the published code made </s> (2) the beginning; stage2_mmdialog was uploaded anew just then, so it may be either.
PUBLISHED = {
    "stage1_cc3m.ckpt": (1_540_697_487, "ef59", "8b34", 2),
    "stage2_vist.ckpt": (1_536_289_349, "d824", "54e1", 2),
    "stage2_mmdialog.ckpt": (1_536_290_373, "68e9", "1734", None),
}


@dataclass(frozen=True)
class Heads:
    """What no tensor shows, with the published values."""

    mapper_heads: int = 8
    lora_alpha: int = 16
    vokens: int = 8


@dataclass(frozen=True)
class Converted:
    """A mapper, and an adapter's configuration and tensors in PEFT's layout."""

    mapper: ReferenceMapper
    adapter_config: dict
    adapter: dict[str, Tensor]
    voken_ids: list[int]
    report: Report


def convert_minigpt5(
    stage1: Path | None,
    stage2: Path | None,
    out: Path,
    bos: str = "auto",
    llm: Path | None = None,
    heads: Heads | None = None,
    dry_run: bool = False,
) -> Report:
    """Writes `mapper.safetensors`, `adapter/` and conversion.json into the folder `out`.

    With `llm`, the converted LLM's folder, the files name it and are checked against it. Raises BadInputError for
    files that are not what they are given as; nothing is guessed.
    """
    if stage1 is None:
        raise BadInputError(
            "Stage 2 alone is not whole: the projection (fc) and the queries (t2i_decoder_prompt) are in stage 1. Give "
            "--stage1 as well, the checkpoint that stage 2 was trained from."
        )
    first = _read_stage(stage1, "stage1")
    second = _read_stage(stage2, "stage2") if stage2 else None
    found = convert_tensors(first, second, heads or Heads())
    latest = stage2 or stage1
    bos_id = find_bos(bos, latest)
    found.report.notes["prompts begin with id"] = str(bos_id)
    if not dry_run:
        with whole_folder(out) as draft:
            _write(found, draft, bos_id, llm, [file.name for file in (stage1, stage2) if file])
    return found.report


def convert_tensors(first: dict[str, Tensor], second: dict[str, Tensor] | None, heads: Heads) -> Converted:
    """Both checkpoints' tensors as a mapper and an adapter; works on meta tensors too."""
    weights = read_published(first)
    report = Report({f"stage1: {name}": _place(name) for name in first})
    if second is not None:
        weights = read_published(second).over(weights)
        report.used |= {f"stage2: {name}": _place(name) for name in second}
        later = set(map(_place, second))
        for name in first:
            if _place(name) in later:
                del report.used[f"stage1: {name}"]
                report.left_over[f"stage1: {name}"] = "stage 2 has a later one"
    mapper = build_published_mapper(weights, heads.mapper_heads, heads.vokens)
    _check_tables(weights, mapper.config.llm_width)
    adapter = {_peft_name(name): tensor for name, tensor in weights.llm.items()}
    rows = len(weights.llm[TABLES[0]])
    # behind the base vocabulary: the vokens, then <ImageHere>
    voken_ids = list(range(rows - heads.vokens - 1, rows - 1))
    return Converted(mapper, _adapter_config(weights, heads.lora_alpha), adapter, voken_ids, report)


def find_bos(choice: str, checkpoint: Path) -> int:
    """1 or 2 as chosen; "auto" knows the published files, and BadInputError says so of any other."""
    if choice != "auto":
        return int(choice)
    size = checkpoint.stat().st_size
    for name, (length, start, end, bos) in PUBLISHED.items():
        if size != length or not _has_digest(checkpoint, start, end):
            continue
        if bos is not None:
            return bos
        raise BadInputError(
            f"{checkpoint} is {name}, which may begin its prompts with id 1 or 2: nobody has published which. Convert "
            "it with --bos 1 and with --bos 2, and keep what tells the better stories."
        )
    raise BadInputError(
        f"{checkpoint} is none of the published files, so --bos auto cannot say what its prompts begin with. Give "
        "--bos 2 if it was trained by the published code of before March 2024, else --bos 1."
    )


def _has_digest(path: Path, start: str, end: str) -> bool:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest.startswith(start) and digest.endswith(end)


def _read_stage(path: Path, flag: str) -> dict[str, Tensor]:
    tensors = read_tensors(path, "state_dict")
    for name in tensors:
        our_name(name)  # which knows what belongs to such a checkpoint
    has_lora = any(".lora_" in name for name in tensors)
    stage = "stage2" if has_lora else "stage1"
    if stage != flag:
        raise BadInputError(
            f"{path} was given as --{flag} but is a checkpoint of stage {stage[-1]} (it holds "
            f"{'LoRA layers' if has_lora else 'no LoRA layers'}). Give it as --{stage}."
        )
    return tensors


def _place(name: str) -> str:
    side, ours = our_name(name)
    return f"{MAPPER}: {ours}" if side == "mapper" else f"{ADAPTER}: {_peft_name(ours)}"


def _peft_name(ours: str) -> str:
    return PREFIX + ours.replace(".default.", ".")


def _check_tables(weights: PublishedWeights, width: int) -> None:
    lora = {name for name in weights.llm if ".lora_" in name}
    if strays := sorted(set(weights.llm) ^ lora ^ set(TABLES)):
        trouble = "lacks" if strays[0] in TABLES else "has no place for"
        raise BadInputError(f"The conversion {trouble} the LLM's {', '.join(strays[:3])}. Is the file whole?")
    shapes = {name: tuple(weights.llm[name].shape) for name in TABLES}
    if len(set(shapes.values())) > 1 or shapes[TABLES[0]][1] != width:
        raise BadInputError(
            f"The checkpoint's embedding is {shapes[TABLES[0]]}, its head {shapes[TABLES[1]]}, and its projection "
            f"takes {width} wide states; expected one vocabulary size and that width. Do the two files belong together?"
        )
    odd = sorted(name for name in lora if _partner(name) not in lora)
    if odd:
        raise BadInputError(
            f"The checkpoint lacks {_partner(odd[0])}, which belongs to {odd[0]}. Download it again."
        )


def _partner(name: str) -> str:
    sides = (".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")
    return name.replace(*sides)


def _adapter_config(weights: PublishedWeights, alpha: int) -> dict:
    lora = {name: tensor for name, tensor in weights.llm.items() if ".lora_" in name}
    ranks = {len(tensor) for name, tensor in lora.items() if ".lora_A." in name} or {8}
    if len(ranks) > 1:
        raise BadInputError(
            f"The checkpoint's LoRA layers have the ranks {sorted(ranks)}, expected one rank."
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=ranks.pop(),
        lora_alpha=alpha,
        lora_dropout=0.05,
        target_modules=sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in lora}) or NO_LORA,
        modules_to_save=[name.removesuffix(".weight").rsplit(".", 1)[-1] for name in TABLES],
        inference_mode=True,
    ).to_dict()
    # sets have no order, and the same checkpoint is to give the same bytes; other versions of PEFT have other defaults
    given = {key: value for key, value in config.items() if value is not None}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in given.items()}


def _write(found: Converted, draft: Path, bos_id: int, llm: Path | None, sources: list[str]) -> None:
    adapter = draft / ADAPTER
    adapter.mkdir()
    config = found.adapter_config | {"base_model_name_or_path": llm.name if llm else None}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = {VOKEN_IDS: json.dumps(found.voken_ids), BOS_ID: str(bos_id)}
    save_checked(found.adapter, adapter / ADAPTER_WEIGHTS, metadata)
    save_mapper(draft / MAPPER, found.mapper, _header(found.mapper, bos_id, llm, sources))
    check_file(draft / MAPPER, found.mapper.state_dict())
    found.report.write(draft)
    if llm is not None:
        _check_against(llm, adapter, found.mapper.config.vokens)


def _header(mapper: ReferenceMapper, bos_id: int, llm: Path | None, sources: list[str]) -> MapperHeader:
    config = mapper.config
    known = (space for space in SPACES.values() if space.pooled_width is None and space.width == config.width)
    space = next(known, Space(f"width {config.width}", config.tokens, config.width))
    trained = {"stage": f"converted from {' and '.join(sources)}", "bos_id": bos_id}
    llm_id, llm_hash = (llm.name, hash_weights(llm)) if llm else ("MiniGPT-4", "")
    return MapperHeader(space, llm_id, config.llm_width, llm_hash, trained)


def _check_against(llm: Path, adapter: Path, vokens: int) -> None:
    """BadInputError unless the adapter fits the LLM, which is built without its weights."""
    with reading(f"The LLM in {llm} cannot be read", llm), torch.device("meta"):
        check_folder(llm)
        here = {"local_files_only": True, "trust_remote_code": False}
        config = forget_code(AutoConfig.from_pretrained(llm, **here))
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(llm, **here)
    read_adapter(adapter, model, tokenizer.convert_tokens_to_ids(voken_strings(vokens)))
