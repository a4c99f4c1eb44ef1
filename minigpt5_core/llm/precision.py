"""How a frozen LLM is held in memory: float32, bf16, or 4 bits (NF4, QLoRA, arXiv 2305.14314) by bitsandbytes."""

import sys
from importlib.util import find_spec
from typing import Any

from ..errors import BadInputError

PRECISIONS = ("float32", "bf16", "4bit")


def dtype_and_quantization(precision: str) -> dict[str, Any]:
    """The arguments `dtype` and `quantization` of `load_llm` for one of PRECISIONS.

    In 4 bits the LLM computes in bf16, and its embedding and head stay in bf16. BadInputError for another name, and for
    4 bits where bitsandbytes is not installed.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if precision not in PRECISIONS:
        raise BadInputError(f"The LLM's precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if precision != "4bit":
        return {"dtype": torch.float32 if precision == "float32" else torch.bfloat16}
    if not find_spec("bitsandbytes"):
        raise BadInputError(
            "An LLM in 4bit needs the Python package bitsandbytes, which is not installed. Install it: "
            f'"{sys.executable}" -m pip install bitsandbytes, or take bf16, which needs four times the memory.'
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"dtype": torch.bfloat16, "quantization": quantization}
