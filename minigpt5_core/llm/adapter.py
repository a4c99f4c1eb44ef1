"""Adapters in PEFT's layout, read and merged without PEFT: voken rows, LoRA (arXiv 2106.09685), a prefix.

A converted checkpoint's adapter holds the whole embedding and head in place of voken rows (PEFT's `modules_to_save`).

A trained adapter is used where PEFT need not be installed, above all inside ComfyUI. Training goes through PEFT itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInputError
from ..tensor_files import read_whole
from ..texts import read_json
from .prefix import Prefix, read_prefix
from .unmerged_lora import UnmergedLora, is_quantized

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's prefix tuning cannot train rows beside it: there they have a file of their own, which says which ids they are.
VOKEN_ROWS, VOKEN_IDS = "voken_rows.safetensors", "minigpt5.voken_ids"
# In the header of a converted adapter's weights: the id its prompts begin with, where it is not the LLM's own.
BOS_ID = "minigpt5.bos_id"
# PEFT's word for an adapter that changes whole matrices and has no LoRA
NO_LORA = "dummy-target-modules"
OTHER_LLM = "Give the LLM it was trained for, or an adapter that was trained for this one."
PREFIX = "base_model.model."
ROWS = "trainable_tokens_delta"
# What is read of PEFT's configuration, and what changes nothing once an adapter is trained. Anything else would change
# the arithmetic: it must have one of the values that say so.
READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "token_indices", "trainable_token_indices",
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
}  # fmt: skip
OF_TRAINING = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "encoder_hidden_size", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "init_weights", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "prefix_projection", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
UNUSED: tuple[Any, ...] = (None, False, {}, [], "", "none")

LARGEST = 1e9  # of a rank or an alpha; NaN is not below it either


@dataclass(frozen=True)
class Adapter:
    """What training added to an LLM: `rows`, (V, width) by module, for the `voken_ids`; LoRA pairs by module.

    A pair is A (rank, in) and B (out, rank); the weight it changes becomes weight + scale * B @ A. A `prefix` changes
    no weight: it stands in front of every story. `whole` are weights that replace a module's own. `bos_id` is the id
    that the adapter's prompts begin with, None where it does not say.
    """

    voken_ids: list[int]
    rows: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]
    scale: float
    prefix: Prefix | None = None
    whole: dict[str, Tensor] = field(default_factory=dict)
    bos_id: int | None = None


def read_adapter(
    folder: Path, causal_lm: PreTrainedModel, voken_ids: list[int], tied_head: bool | None = None
) -> Adapter:
    """The adapter in a PEFT folder; BadInputError unless it is whole and made for this LLM and its vokens.

    `tied_head` says whether the LLM has one matrix for embedding and head (None: look): see `FrozenLLM.tied_head`.
    """
    _check_files(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(config)
    prefix, header = None, {}
    file = folder / ADAPTER_WEIGHTS
    if config["peft_type"] == "PREFIX_TUNING":
        prefix = read_prefix(file, causal_lm)
        file = folder / VOKEN_ROWS
        config = _config_of_rows(file)
    elif config.get("modules_to_save"):
        header = read_header(file)
        config["token_indices"] = json.loads(header.get(VOKEN_IDS, "[]"))
    width = causal_lm.get_input_embeddings().weight.shape[1]
    _check_voken_rows(config, voken_ids, width, folder)
    weights, _ = read_whole(file)
    _check_tensors(config, weights, causal_lm, width, folder)
    plain = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    rows = {_module_of_rows(name): weight for name, weight in plain.items() if name.endswith(ROWS)}
    modules = [name.removesuffix(".lora_A.weight") for name in plain if name.endswith(".lora_A.weight")]
    lora = {
        module: (plain[f"{module}.lora_A.weight"], plain[f"{module}.lora_B.weight"]) for module in modules
    }
    scale = config["lora_alpha"] / config["r"] if lora else 1.0
    whole = {name: plain[f"{name}.weight"] for name in _tables(causal_lm) if f"{name}.weight" in plain}
    if tied_head is None:
        tied_head = causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    if whole and tied_head:
        raise BadInputError(
            f"The adapter in {folder} holds an embedding and a head, but this LLM has one matrix for both. {OTHER_LLM}"
        )
    bos_id = int(header[BOS_ID]) if BOS_ID in header else None
    return Adapter(voken_ids, rows, lora, scale, prefix, whole, bos_id)


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _config_of_rows(file: Path) -> dict[str, Any]:
    """The configuration that PEFT would write for the rows in a file beside a prefix."""
    if not file.is_file():
        raise BadInputError(
            f"{file.parent} has no {VOKEN_ROWS}, which belongs to its prefix. Copy that file as well."
        )
    ids = json.loads(read_header(file).get(VOKEN_IDS, "[]"))
    return {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids}


def split_quantized_lora(
    causal_lm: PreTrainedModel, adapter: Adapter, strength: float = 1.0
) -> tuple[Adapter, UnmergedLora | None]:
    """The adapter without the LoRA pairs of quantized weights, and those pairs at `strength`, if there are any."""
    lora = adapter.lora.items()
    quantized = {name: pair for name, pair in lora if is_quantized(causal_lm.get_submodule(name))}
    if not quantized:
        return adapter, None
    rest = {name: pair for name, pair in lora if name not in quantized}
    return replace(adapter, lora=rest), UnmergedLora(quantized, strength * adapter.scale)


@torch.no_grad()
def merge_adapter(causal_lm: PreTrainedModel, adapter: Adapter) -> None:
    """Merges the adapter into the LLM's weights, in place. None of these may be quantized (`split_quantized_lora`)."""
    for module, whole in adapter.whole.items():
        causal_lm.get_submodule(module).weight.copy_(whole)
    for module, rows in adapter.rows.items():
        weight = causal_lm.get_submodule(module).weight
        weight[adapter.voken_ids] = rows.to(weight)
    for module, (down, up) in adapter.lora.items():
        weight = causal_lm.get_submodule(module).weight
        weight += (adapter.scale * up.to(weight) @ down.to(weight)).to(weight)


def _check_files(folder: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise BadInputError(
                f"{folder} is no PEFT adapter (it has no {name}). Give the adapter/ folder that python -m trainer "
                "wrote."
            )


def _check_config(config: Any) -> None:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "TRAINABLE_TOKENS", "PREFIX_TUNING"):
        raise ValueError(f"its peft_type is {kind!r}, expected LORA, TRAINABLE_TOKENS or PREFIX_TUNING.")
    for name in sorted(set(config) - READ - OF_TRAINING):
        if config[name] not in UNUSED:
            raise ValueError(
                f"it sets {name} to {config[name]!r:.80}, which would change what it does and is not supported; plain "
                "LoRA, voken rows and prefixes are."
            )
    for name in ("r", "lora_alpha") if kind == "LORA" else ():
        if type(config.get(name)) not in (int, float) or not 0 < config[name] < LARGEST:
            raise ValueError(f"its {name} is {config.get(name)!r:.80}, expected a number above 0.")
    if config.get("modules_to_save") and config["peft_type"] != "LORA":
        raise ValueError(
            f"it sets modules_to_save for {config['peft_type']}, which is supported for LORA only."
        )


def _check_voken_rows(config: dict, voken_ids: list[int], width: int, folder: Path) -> None:
    """BadInputError unless the adapter trains exactly the rows that are vokens in this LLM."""
    rows = config.get("token_indices") or config.get("trainable_token_indices") or []
    if not rows:
        raise BadInputError(
            f"The adapter in {folder} trains no vokens, as python -m trainer's do: it is a LoRA for text alone, and "
            "the LLM would know no more of pictures than without it. To use it, merge it into the LLM with PEFT "
            "(merge_and_unload, then save_pretrained), load that as the LLM, and train an adapter for it."
        )
    for found in rows.values() if isinstance(rows, dict) else [rows]:  # LoRA may name them layer by layer
        if list(found) != voken_ids:
            raise BadInputError(
                f"The adapter in {folder} trains the rows {_span(found)}, but the vokens of this LLM of width "
                f"{width} are the rows {_span(voken_ids)}. {_count_cure(len(found), len(voken_ids))}{OTHER_LLM}"
            )


def _count_cure(wanted: int, found: int) -> str:
    return "" if wanted == found else f"Set vokens to {wanted} where the LLM is loaded. "


def _span(rows: list[int]) -> str:
    return f"{rows[0]} to {rows[-1]} ({len(rows)})" if rows else "of no token"


def _check_tensors(
    config: dict, weights: dict[str, Tensor], causal_lm: PreTrainedModel, width: int, folder: Path
) -> None:
    expected = dict(_expected(config, causal_lm, weights))
    head = _name_of(causal_lm, causal_lm.get_output_embeddings())
    optional = {
        f"{PREFIX}{head}.{ROWS}",
        f"{PREFIX}{head}.token_adapter.{ROWS}",
    }  # of a tied head, or its own
    found = {name: tuple(weight.shape) for name, weight in weights.items() if name not in optional}
    strays = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if not strays:
        return
    first = strays[0]
    if first not in found:
        trouble = f"the file lacks {first}"
    elif first not in expected:
        trouble = f"the LLM has no place for {first}"
    else:
        trouble = f"{first} is {found[first]}, expected {expected[first]}"
    raise BadInputError(
        f"The adapter in {folder} does not fit an LLM of width {width}: {len(strays)} tensors differ; {trouble}. "
        f"{OTHER_LLM}"
    )


def _expected(
    config: dict, causal_lm: PreTrainedModel, weights: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of all tensors that an adapter of this configuration holds for this LLM."""
    if config.get("modules_to_save"):
        for name in _tables(causal_lm):
            yield f"{PREFIX}{name}.weight", tuple(causal_lm.get_submodule(name).weight.shape)
    else:
        yield _expected_rows(config, causal_lm)
    if config["peft_type"] != "LORA":
        return
    targets = _targets(config["target_modules"], weights)
    for name, module in causal_lm.named_modules():
        if isinstance(module, nn.Linear) and _is_target(name, targets):
            yield f"{PREFIX}{name}.lora_A.weight", (config["r"], module.in_features)
            yield f"{PREFIX}{name}.lora_B.weight", (module.out_features, config["r"])


def _targets(named: str | list[str], weights: dict[str, Tensor]) -> list[str]:
    """The modules that LoRA changes, as a list. PEFT also takes a pattern, or words such as all-linear: which modules
    that were, the file itself says, and nobody else's pattern is run."""
    if not isinstance(named, str):
        return named
    ending = ".lora_A.weight"
    held = [name.removeprefix(PREFIX).removesuffix(ending) for name in weights if name.endswith(ending)]
    return [] if named == NO_LORA else held


def _expected_rows(config: dict, causal_lm: PreTrainedModel) -> tuple[str, tuple[int, ...]]:
    embedding = causal_lm.get_input_embeddings()
    indices = config.get("token_indices") or config["trainable_token_indices"]
    count = len(next(iter(indices.values())) if isinstance(indices, dict) else indices)
    inside = ".token_adapter" if config["peft_type"] == "LORA" else ""
    return f"{PREFIX}{_name_of(causal_lm, embedding)}{inside}.{ROWS}", (count, embedding.weight.shape[1])


def _tables(causal_lm: PreTrainedModel) -> list[str]:
    """The names of the embedding and the head."""
    return [
        _name_of(causal_lm, table)
        for table in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    ]


def _is_target(name: str, targets: list[str]) -> bool:
    """Whether a module is one of PEFT's targets: each is a module's whole path, or the end of it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _module_of_rows(name: str) -> str:
    return name.removesuffix(f".{ROWS}").removesuffix(".token_adapter")
