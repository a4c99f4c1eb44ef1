"""A model in ComfyUI's keeping, with what is laid over its weights."""

from typing import Any


class ModelPatcher:
    """`patches`: by weight, a list of (strength, patch, strength of the model, offset, function)."""

    def __init__(
        self,
        model: Any,
        load_device: Any,
        offload_device: Any,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        if getattr(model, "device", None) is None:
            model.device = offload_device  # transformers' own models refuse this
        self.patches: dict[str, list[tuple]] = {}
        self.backup: dict[str, Any] = {}

    def clone(self) -> "ModelPatcher":
        """Another set of patches over the same model, whose replaced weights all share."""
        twin = type(self)(self.model, self.load_device, self.offload_device)
        twin.patches = {name: list(patches) for name, patches in self.patches.items()}
        twin.backup = self.backup
        return twin

    def add_patches(
        self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        """Lays patches over weights; those for weights that the model lacks are left out without a word."""
        known = [name for name in patches if name in self.model.state_dict()]
        for name in known:
            entry = (strength_patch, patches[name], strength_model, None, None)
            self.patches.setdefault(name, []).append(entry)
        return known
