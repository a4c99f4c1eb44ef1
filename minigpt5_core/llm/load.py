"""Loads a frozen LLM from its folder, and what goes on top of it: an adapter, and what it sees pictures with."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import BadInputError
from ..own_code import check_folder, forget_code
from ..reading import reading
from ..tensor_files import check_finite
from ..versions import DTYPE
from ..vision.encoder import ImageEncoder
from ..vision.image_adapter import IMAGE_ADAPTER, QFORMER, load_image_adapter
from ..vision.qformer import QFormerEncoder, load_qformer
from ..vokens import PICTURE, voken_strings
from ..whole_models import load_whole
from .adapter import OTHER_LLM, merge_adapter, read_adapter, split_quantized_lora
from .families import find_family, load_family
from .families.base import Family
from .frozen import FrozenLLM
from .gguf_files import OTHER_FILE, read_gguf
from .unmerged_lora import keep_layout
from .weights import gguf_in, hash_weights


def load_llm(
    folder: Path,
    vokens: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Any = None,
) -> FrozenLLM:
    """Loads a Hugging Face folder and adds `vokens` rows after its own, each the mean of all others.

    `folder` may also be a GGUF file, or hold a single one in place of safetensors. `quantization` is one of
    transformers' configurations, such as BitsAndBytesConfig. Raises BadInputError when the folder holds no LLM of a
    known family that transformers can read from safetensors or GGUF.
    """
    if file := gguf_in(folder):
        return _load_gguf(file, vokens, dtype, device, quantization)
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{folder} is no Hugging Face model folder (it has no config.json). Give a folder that holds config.json, "
            "safetensors weights and a tokenizer, or a .gguf file, or make the default one: "
            "python -m minigpt5_core get-llm"
        )
    if not any(folder.glob("[!.]*.safetensors")):
        raise BadInputError(
            f"{folder} holds no .safetensors weights, and pickled ones (.bin) are never read. Save the model again "
            "with transformers' save_pretrained, which writes safetensors."
        )
    with reading(f"The LLM in {folder} cannot be read", folder):
        kind = find_family(folder)
        check_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        small = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
        model = load_whole(
            kind.model_class,
            folder,
            config=forget_code(config),
            **{DTYPE: dtype},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **small,
        )
        if quantization:  # it is on its device already, and must not be moved
            keep_layout(model)
        else:
            model = model.to(device)
        family = load_family(kind, folder, model.config, tokenizer)
        return _tried(add_vokens(tokenizer, model, vokens, family))


def _tried(llm: FrozenLLM) -> FrozenLLM:
    """The LLM, its chat template tried: one that fails should be said now, not in the midst of a story."""
    assert llm.chat
    return llm


def _load_gguf(
    file: Path, vokens: int, dtype: torch.dtype, device: str | torch.device, quantization: Any
) -> FrozenLLM:
    if quantization:
        raise BadInputError(
            f"{file} is a GGUF file, which is unpacked when it is read and cannot be held in 4 bits. Take another "
            "precision (bf16), or give the same model as a Hugging Face folder with safetensors weights."
        )
    with reading(f"The LLM in {file} cannot be read", file, OTHER_FILE):
        tokenizer, model = read_gguf(file, dtype)
        check_finite(model, f"{file} is damaged")
        return _tried(add_vokens(tokenizer, model.to(device), vokens))


def add_vokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, vokens: int, family: Family | None = None
) -> FrozenLLM:
    """Adds voken tokens to a tokenizer and their rows to a model, both in place, and freezes the model."""
    strings = voken_strings(vokens)
    known = tokenizer.get_vocab()  # those already there keep how they treat white space beside them
    tokenizer.add_tokens([name for name in (*strings, PICTURE) if name not in known], special_tokens=True)
    voken_ids = tokenizer.convert_tokens_to_ids(strings)
    rows = model.get_input_embeddings().num_embeddings
    if max(voken_ids) >= rows:
        model.resize_token_embeddings(max(voken_ids) + 1, mean_resizing=False)
    llm = FrozenLLM(tokenizer, model.requires_grad_(False).eval(), voken_ids, family=family or Family())
    others = [index for index in range(rows) if index not in set(voken_ids)]
    for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        with torch.no_grad():
            table.weight[voken_ids] = table.weight[others].mean(0)
    return llm


def load_adapter(llm: FrozenLLM, folder: Path) -> FrozenLLM:
    """The LLM with a PEFT adapter (voken rows, LoRA or a prefix), for use.

    Voken rows and LoRA are merged into the weights of the causal LM, which the LLM given shares: it must not be used
    any more. LoRA of quantized weights stays unmerged. Files are never touched. Raises BadInputError when the folder is
    no whole PEFT adapter or was trained for another LLM.
    """
    with reading(f"The adapter in {folder} does not fit an LLM of width {llm.width}", folder, OTHER_LLM):
        adapter = read_adapter(folder, llm.causal_lm, llm.voken_ids, llm.tied_head)
    mergeable, unmerged = split_quantized_lora(llm.causal_lm, adapter)
    merge_adapter(llm.causal_lm, mergeable)
    return llm.with_adapter(adapter, unmerged.to(llm.device) if unmerged else None)


def load_vision(
    llm: FrozenLLM, folder: Path, spare: Path | None = None, chosen: Path | None = None
) -> FrozenLLM:
    """The LLM of `folder` with vision: by the `chosen` image adapter, by one in its folder, or by `spare`.

    The folder may hold an image adapter or a converted Q-Former. `spare` is used only with the weights it was trained
    for. An LLM with vision of its own, or for which none is found, is returned as it is; else the one returned shares
    all but the image encoder with the one given. Raises BadInputError for an image encoder, chosen or in the folder,
    that is broken or for another width.
    """
    if llm.family.has_vision:
        if chosen:
            raise BadInputError(f"The LLM in {folder} sees by itself. Leave the image adapter {chosen} out.")
        return llm
    encoder: ImageEncoder | QFormerEncoder
    if chosen is None and (folder / QFORMER).is_file():
        encoder = load_qformer(folder / QFORMER, llm.causal_lm.dtype)
        _check_width(llm, folder / QFORMER, encoder.config.llm_width)
    elif chosen or (folder / IMAGE_ADAPTER).is_file():
        encoder, header = load_image_adapter(chosen or folder / IMAGE_ADAPTER)
        _check_width(llm, chosen or folder / IMAGE_ADAPTER, header.llm_width, header.llm_id)
    elif spare is not None and spare.is_file():
        encoder, header = load_image_adapter(spare)
        if header.llm_hash != hash_weights(folder):
            return llm
    else:
        return llm
    return llm.with_vision(encoder.requires_grad_(False).to(llm.device))


def has_vision_files(folder: Path) -> bool:
    """Whether the folder of an LLM holds an image encoder for it."""
    return any((folder / name).is_file() for name in (IMAGE_ADAPTER, QFORMER))


def _check_width(llm: FrozenLLM, file: Path, width: int, llm_id: str = "it was converted with") -> None:
    if width != llm.width:
        raise BadInputError(
            f"{file} was trained for the LLM {llm_id} of width {width}, but this one is {llm.width} wide. Leave it "
            "out, or train one for this LLM: python -m trainer image-adapter"
        )
