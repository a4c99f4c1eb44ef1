"""Where models are computed: here always on the CPU. Notes what is loaded."""

from typing import Any

import torch

loads: list[dict[str, Any]] = []
freed: list[int] = []
interrupted: list[bool] = []


class InterruptProcessingException(BaseException):
    """The user has pressed Cancel."""


def throw_exception_if_processing_interrupted() -> None:
    if interrupted:
        interrupted.clear()
        raise InterruptProcessingException


def load_models_gpu(
    models: list[Any],
    memory_required: int = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: int | None = None,
    force_full_load: bool = False,
) -> None:
    loads.append({"models": models, "memory_required": memory_required, "force_full_load": force_full_load})


def text_encoder_device() -> torch.device:
    return torch.device("cpu")


def text_encoder_offload_device() -> torch.device:
    return torch.device("cpu")


def text_encoder_dtype(device: torch.device | None = None) -> torch.dtype:
    return torch.float16


def should_use_bf16(
    device: torch.device | None = None,
    model_params: int = 0,
    prioritize_performance: bool = True,
    manual_cast: bool = False,
) -> bool:
    return False


def intermediate_device() -> torch.device:
    return torch.device("cpu")


def get_torch_device() -> torch.device:
    return torch.device("cpu")


def free_memory(
    memory_required: int, device: torch.device, keep_loaded: list[Any] | None = None
) -> list[Any]:
    """Unloads models until so many bytes are free on the device."""
    freed.append(memory_required)
    return []
