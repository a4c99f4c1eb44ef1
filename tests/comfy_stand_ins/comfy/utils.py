"""Progress bars, weight files and scaled pictures."""

from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

PROGRESS_BAR_HOOK: Callable[..., None] | None = None


def set_progress_bar_global_hook(function: Callable[..., None] | None) -> None:
    """`function` hears every tick; ComfyUI's own raises there when the user has pressed Cancel."""
    global PROGRESS_BAR_HOOK
    PROGRESS_BAR_HOOK = function


class ProgressBar:
    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total, self.node_id, self.current, self.hook = total, node_id, 0, PROGRESS_BAR_HOOK

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        if self.hook is not None:
            self.hook(self.current, self.total, preview, node_id=self.node_id)

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


def load_torch_file(
    ckpt: str, safe_load: bool = False, device: Any = None, return_metadata: bool = False
) -> dict[str, Tensor]:
    return load_file(ckpt)


def common_upscale(samples: Tensor, width: int, height: int, upscale_method: str, crop: str) -> Tensor:
    """(N, C, H, W) cut to the new proportions around the centre, then scaled."""
    old_height, old_width = samples.shape[-2:]
    if crop == "center":
        kept_width = min(old_width, round(old_height * width / height))
        kept_height = min(old_height, round(old_width * height / width))
        left, top = (old_width - kept_width) // 2, (old_height - kept_height) // 2
        samples = samples[..., top : top + kept_height, left : left + kept_width]
    return interpolate(samples, size=(height, width), mode=upscale_method)
