"""An autoencoder, as far as it is given its weights."""

from typing import Any


class VAE:
    def __init__(
        self, sd: Any = None, device: Any = None, config: Any = None, dtype: Any = None, metadata: Any = None
    ) -> None:
        self.weights = sd

    def throw_exception_if_invalid(self) -> None:
        """ComfyUI raises for weights of no VAE that it knows."""
