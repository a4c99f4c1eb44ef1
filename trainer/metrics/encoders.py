"""Pictures and texts as features of local CLIP (arXiv 2103.00020) and DINO (arXiv 2104.14294, 2304.07193) models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from minigpt5_core.errors import BadInputError

from .weights import companion, pretrained

Item = TypeVar("Item")


def batched(encode: Callable[[list[Item]], torch.Tensor], items: Sequence[Item], batch: int) -> np.ndarray:
    """(N, D) in double precision, `batch` items at a time."""
    parts = [encode(list(items[first : first + batch])) for first in range(0, len(items), batch)]
    return torch.cat(parts).double().cpu().numpy()


class PictureReader:
    """PIL pictures -> pixel values (B, 3, H, W), with a model's own image processor."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        # this backend needs no torchvision, and resizes as the models' authors did
        self.processor = companion(AutoImageProcessor, folder, backend="pil")
        self.device = device

    def __call__(self, pictures: list[Image.Image]) -> torch.Tensor:
        colours = [picture.convert("RGB") for picture in pictures]
        return self.processor(images=colours, return_tensors="pt")["pixel_values"].to(self.device)


class Clip:
    """Both of CLIP's encoders: features (N, D) in the space they share, of length 1."""

    def __init__(self, folder: Path, device: torch.device, batch: int) -> None:
        self.model = pretrained(CLIPModel, folder, device)
        self.reader = PictureReader(folder, device)
        self.tokenizer = companion(AutoTokenizer, folder)
        self.batch = batch

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return unit_length(batched(self._pictures, pictures, self.batch))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts beyond CLIP's context (77 tokens) are cut."""
        return unit_length(batched(self._texts, texts, self.batch))

    @torch.no_grad()
    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(self.reader(pictures)).pooler_output)

    @torch.no_grad()
    def _texts(self, texts: list[str]) -> torch.Tensor:
        context = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=context, return_tensors="pt"
        ).to(self.reader.device)
        hidden = self.model.text_model(tokens["input_ids"], tokens["attention_mask"])
        return self.model.text_projection(hidden.pooler_output)


class Dino:
    """A DINO vision transformer's class token: features (N, D) of length 1 (DINO-I of arXiv 2208.12242)."""

    def __init__(self, folder: Path, device: torch.device, batch: int) -> None:
        self.model = pretrained(AutoModel, folder, device)
        if self.model.main_input_name != "pixel_values":
            raise BadInputError(
                f"dino: {folder} cannot be used: {type(self.model).__name__} does not read pictures alone. "
                "Name the folder of a vision transformer such as DINOv2."
            )
        self.reader = PictureReader(folder, device)
        self.batch = batch

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return unit_length(batched(self._pictures, pictures, self.batch))

    @torch.no_grad()
    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        hidden = self.model(pixel_values=self.reader(pictures)).last_hidden_state
        if hidden.ndim != 3:
            raise BadInputError(
                f"dino: {type(self.model).__name__} gives features {tuple(hidden.shape)}; expected the tokens "
                "of a vision transformer (B, T, D), such as DINOv2's."
            )
        return hidden[:, 0]


def unit_length(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) of features (N, D) of length 1, row by row; NaN where either row is."""
    return (first * second).sum(1)
