"""What learns of the LLM, through PEFT: voken rows alone, LoRA or a prefix with them; and how it is written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import nn

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_adapter
from minigpt5_core.llm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, VOKEN_IDS, VOKEN_ROWS
from minigpt5_core.tensor_files import atomic_save, sign
from minigpt5_core.texts import read_json

KINDS = ("LORA", "TRAINABLE_TOKENS", "PREFIX_TUNING")
# settings of PEFT's that import a module or read a file which the configuration names
IMPORTING = ("megatron_config", "corda_config", "eva_config", "lora_ga_config", "arrow_config")


def voken_tables(llm: FrozenLLM) -> list[str]:
    """The modules whose voken rows learn: the embedding, and the output head where it has weights of its own."""
    embedding, head = llm.causal_lm.get_input_embeddings(), llm.causal_lm.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {module: name.rsplit(".", 1)[-1] for name, module in llm.causal_lm.named_modules()}
    return [names[table] for table in tables]


def decoder_targets(llm: FrozenLLM, names: Sequence[str]) -> list[str]:
    """The names of linear layers as they are; or, where a vision tower has layers of these names too, the paths of the
    decoder's own."""
    named = [
        (path, layer) for path, layer in llm.causal_lm.named_modules() if path.rsplit(".", 1)[-1] in names
    ]
    own = set(llm.decoder.modules())
    if all(layer in own for _, layer in named):
        return list(names)
    return [path for path, layer in named if layer in own]


Adapted = tuple[FrozenLLM, PeftModel]
"""An LLM with what learns of it, and the same as PEFT has it: they share their modules."""


def with_voken_rows(llm: FrozenLLM) -> Adapted:
    """Makes the voken rows trainable, in PEFT's layout, and nothing else; the layers are changed in place."""
    tables = TrainableTokensConfig(token_indices=llm.voken_ids, target_modules=voken_tables(llm))
    return llm, get_peft_model(llm.causal_lm, tables)


def with_prefix(llm: FrozenLLM, tokens: int, width: int) -> Adapted:
    """The LLM with a learned prefix of `tokens` in front of every story, and what trains it and the voken rows.

    The causal LM is shared with the LLM given and changed in place. The prefix comes out of a network of that `width`,
    or with width 0 is learned itself.
    """
    projected = {"prefix_projection": True, "encoder_hidden_size": width} if width else {}
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens, **projected)
    adapted = get_peft_model(llm.causal_lm, config)
    # in place, and after the prefix, which freezes everything it finds
    with_voken_rows(llm)
    return llm.with_prefix(adapted.get_prompt), adapted


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapt(llm: FrozenLLM, start: Path | None, fresh: Callable[[FrozenLLM], Adapted]) -> Adapted:
    """The LLM with what learns of it: stage 2's own adapter of an earlier run goes on; else `fresh` makes one.

    Voken rows of an earlier stage 1 are merged first, for the fresh adapter to begin with. The causal LM is shared with
    the LLM given and changed in place.
    """
    if start is None:
        return fresh(llm)
    if not (start / "mapper.safetensors").is_file():
        raise BadInputError(
            f"--from {start} holds no mapper.safetensors. Give the --out folder of an align or finetune run."
        )
    check_peft(start / "adapter")
    kind = PeftConfig.from_pretrained(str(start / "adapter")).peft_type
    if kind == PeftType.PREFIX_TUNING:
        raise BadInputError(
            f"--from {start}: its adapter is a learned prefix, and the network it came out of is not kept. Give a run "
            "of align, or of finetune with LoRA; an interrupted run goes on with --resume."
        )
    if kind == PeftType.LORA:
        return llm, PeftModel.from_pretrained(llm.causal_lm, str(start / "adapter"), is_trainable=True)
    return fresh(load_adapter(llm, start / "adapter"))


def check_peft(folder: Path) -> None:
    """BadInputError unless PEFT can read the adapter from the folder alone: whole, and nothing in it to import.

    PEFT imports a module that `megatron_core` names, and asks the Hub for weights that are not there.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise BadInputError(
                f"{folder} is no PEFT adapter (it has no {name}). Give the folder of a trained one."
            )
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{folder / ADAPTER_CONFIG} cannot be read ({error}). Copy it again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise BadInputError(
            f"{folder}: its peft_type is {kind!r}, expected {', '.join(KINDS)}. Give another adapter."
        )
    for name in IMPORTING:
        if config.get(name):
            raise BadInputError(
                f"{folder}: its {name} is {config[name]!r:.80}, by which PEFT would import other code or read other "
                "files; expected none. Give an adapter of plain LoRA."
            )


def save_adapter(adapted: PeftModel, llm_folder: Path, folder: Path) -> None:
    """Writes the adapter as a PEFT folder, without the embedding matrices that the vokens have made longer."""
    # a path would say whose machine
    adapted.peft_config["default"].base_model_name_or_path = llm_folder.name
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    sign(folder / ADAPTER_WEIGHTS)
    if adapted.peft_config["default"].peft_type == PeftType.PREFIX_TUNING:
        save_voken_rows(adapted, folder)


def save_voken_rows(adapted: PeftModel, folder: Path) -> None:
    """Writes the rows that learned beside the prefix into its folder."""
    rows, ids = {}, []
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "trainable_tokens_delta"):
            rows[f"{PREFIX}{name}.trainable_tokens_delta"] = module.trainable_tokens_delta["default"].detach()
            ids = list(module.token_indices["default"])
    metadata = {"format": "pt", VOKEN_IDS: json.dumps(ids)}
    atomic_save({name: row.contiguous().clone() for name, row in rows.items()}, folder / VOKEN_ROWS, metadata)
