"""LoRA files as patches."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str], log_missing: bool = True) -> dict[str, Any]:
    """By the weight's name (`to_load` maps module to weight): what is added to it.

    That is up @ down * alpha / rank, or a difference of the weight's own shape.
    """
    whole = {
        weight: ("diff", (lora[f"{module}.diff"],))
        for module, weight in to_load.items()
        if f"{module}.diff" in lora
    }
    return whole | {
        weight: SimpleNamespace(
            up=lora[f"{module}.lora_up.weight"],
            down=lora[f"{module}.lora_down.weight"],
            alpha=lora[f"{module}.alpha"].item(),
        )
        for module, weight in to_load.items()
        if f"{module}.lora_up.weight" in lora
    }
