"""Another device, for a machine that has none."""

import torch


class Elsewhere(torch.Tensor):
    """A tensor on another device, as far as it goes: it meets no other before it is moved."""

    @classmethod
    def __torch_function__(cls, function, types, given=(), named=None):
        moved = function in (torch.Tensor.cpu, torch.Tensor.to)
        if not moved and not all(issubclass(kind, cls) for kind in types):
            raise RuntimeError("Expected all tensors to be on the same device")
        answer = super().__torch_function__(function, types, given, named or {})
        return answer.as_subclass(torch.Tensor) if moved and isinstance(answer, torch.Tensor) else answer
