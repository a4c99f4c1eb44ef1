"""An LLM in a GGUF file (llama.cpp's format), read by transformers, which unpacks its blocks into plain matrices.

The tokenizer is built from the file as well, unless a tokenizer.json lies beside it: GGUF only names the rule by which
text is split before the merges, and does not contain it.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..errors import BadInputError
from ..own_code import check_alone
from ..versions import check_transformers
from .families import family_of

OLDEST = "5"  # older ones need a bos token in the file, and were not tested further
MAGIC, TOKENIZER = b"GGUF", "tokenizer.json"
HERE = {"local_files_only": True, "trust_remote_code": False}
OTHER_FILE = "Give the same model as a Hugging Face folder with safetensors weights, or another GGUF file."


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and causal LM of a GGUF file, the weights in `dtype`, on the CPU.

    BadInputError for a file that is not there, no GGUF or of another kind than a text-only causal LM, and where the
    package gguf is missing; what transformers raises for a file that it cannot read is passed on.
    """
    check_gguf(file)
    check_transformers(f"{file} is a GGUF file", OLDEST)
    inside = {"gguf_file": file.name, **HERE}
    check_alone(file.parent)
    config = AutoConfig.from_pretrained(file.parent, **inside)
    family_of(config.model_type, file)
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, dtype=dtype, output_loading_info=True, **inside, **_unpacked()
    )
    if missing := sorted(found["missing_keys"]):  # transformers would initialise them at random
        raise BadInputError(
            f"{file} lacks {len(missing)} of the model's tensors, {missing[0]} among them, as the parts of a split "
            f"model do. {OTHER_FILE}"
        )
    return _read_tokenizer(file, config), model


def _read_tokenizer(file: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    if (file.parent / TOKENIZER).is_file():
        return AutoTokenizer.from_pretrained(file.parent, config=config, **HERE)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **HERE)
    return _without_strays(tokenizer, config.vocab_size)


def _without_strays(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer with only the tokens its model was trained with, so that vokens get the same ids as elsewhere.

    A GGUF file names a token for every row, [PAD7] where the tokenizer had none for row 7; transformers appends others,
    such as GPT-2's eos token.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    if isinstance(vocab, dict):  # of merges, not of scores
        backend["model"]["vocab"] = {name: index for name, index in vocab.items() if name != f"[PAD{index}]"}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < rows]
    kept = Tokenizer.from_str(json.dumps(backend))
    special = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=kept,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in special.items() if kept.token_to_id(token) is not None},
    )


def check_gguf(file: Path) -> None:
    """BadInputError unless `file` begins as GGUF does, and the package that reads it is installed."""
    if not file.is_file():
        raise BadInputError(f"There is no file {file}. Give a GGUF file, or a Hugging Face model folder.")
    with file.open("rb") as opened:
        magic = opened.read(len(MAGIC))
    if magic != MAGIC:
        raise BadInputError(
            f"{file} is no GGUF file (it begins with {magic!r}, expected {MAGIC!r}). {OTHER_FILE}"
        )
    if not find_spec("gguf"):
        raise BadInputError(
            f"{file} is a GGUF file, and the Python package gguf, which reads those, is not installed. Install it: "
            f'"{sys.executable}" -m pip install gguf'
        )


def _unpacked() -> dict[str, Any]:
    """The argument by which newer versions of transformers unpack the weights; older ones always do.

    Voken rows and LoRA could not be written into packed weights, and a kernel would be downloaded for them.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
