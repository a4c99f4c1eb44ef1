"""LoRA (arXiv 2106.09685) of weights that are quantized to 4 bits, into which it cannot be merged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel


class UnmergedLora(nn.Module):
    """LoRA pairs by module, A (rank, in) and B (out, rank): while applied, a module's y becomes y + scale * B A x.

    They are held and computed in float32, as PEFT does. The LLM they were applied to is the same as ever afterwards.
    """

    def __init__(self, lora: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.names, self.scale = list(lora), scale
        self.downs = nn.ParameterList(down.float() for down, _ in lora.values()).requires_grad_(False)
        self.ups = nn.ParameterList(up.float() for _, up in lora.values()).requires_grad_(False)

    @contextmanager
    def applied_to(self, causal_lm: PreTrainedModel) -> Iterator[None]:
        """The LLM answers with the LoRA in this context."""
        pairs = zip(self.names, self.downs, self.ups, strict=True)
        hooks = [
            causal_lm.get_submodule(name).register_forward_hook(self._update(down, up))
            for name, down, up in pairs
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _update(self, down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def add_update(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return (output + self.scale * (inputs[0].float() @ down.T) @ up.T).to(output.dtype)

        return add_update


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is held as packed integers, to which nothing can be added."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def keep_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for CPUs with AVX512-BF16.

    That layout doubles the speed there, but `state_dict()`, which ComfyUI calls at will, does not restore the scales in
    order (bitsandbytes 0.50), and rounds them to bf16, so that results would differ between CPUs.
    """
    for module in filter(is_quantized, model.modules()):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
