"""Inception's features and class logits for FID, KID and the Inception Score, or another image classifier's."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from minigpt5_core.errors import BadInputError

from .encoders import PictureReader
from .weights import library, pretrained


class Classified(NamedTuple):
    """Features (N, D) and class logits (N, K)."""

    features: np.ndarray
    logits: np.ndarray


class Inception:
    """The Inception v3 that FID is defined with (arXiv 1706.08500), as torch-fidelity holds it: D 2048, K 1008."""

    note = ""

    def __init__(self, weights: Path, device: torch.device) -> None:
        module = library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity torchvision")
        _check(weights)
        self.device = device
        self.model = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        ).to(device)

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image]) -> Classified:
        """One by one, since they differ in size and the resize to 299 x 299 is the network's own."""
        both = [self.model(_bytes(picture).to(self.device)) for picture in pictures]
        features, logits = (torch.cat(part).double().cpu().numpy() for part in zip(*both, strict=True))
        return Classified(features, logits)


class Classifier:
    """An image classifier in transformers' format in Inception's place; features are its last hidden state's mean."""

    def __init__(self, folder: Path, device: torch.device, batch: int) -> None:
        self.model = pretrained(AutoModelForImageClassification, folder, device)
        self.reader = PictureReader(folder, device)
        self.batch = batch
        self.note = (
            f"On {type(self.model).__name__}'s features, not Inception's: comparable only with the same."
        )

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image]) -> Classified:
        features, logits = [], []
        for first in range(0, len(pictures), self.batch):
            pixels = self.reader(list(pictures[first : first + self.batch]))
            output = self.model(pixel_values=pixels, output_hidden_states=True)
            hidden = output.hidden_states[-1]  # (B, D, H, W) or (B, T, D)
            features.append(hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1))
            logits.append(output.logits)
        both = [torch.cat(part).double().cpu().numpy() for part in (features, logits)]
        return Classified(*both)


def load_inception(path: Path, device: torch.device, batch: int) -> Inception | Classifier:
    """A file is Inception's weights, a folder is a classifier."""
    return Classifier(path, device, batch) if path.is_dir() else Inception(path, device)


def resized(picture: Image.Image, shorter: int) -> Image.Image:
    """RGB, its shorter side `shorter` pixels, bilinear."""
    scale = shorter / min(picture.size)
    size = [shorter if side == min(picture.size) else int(side * scale) for side in picture.size]
    return picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _bytes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]


def _check(weights: Path) -> None:
    """torch-fidelity unpickles whatever is in the file; what passes here holds tensors and nothing that could run."""
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BadInputError(f"inception: {weights} cannot be read: {error}. {_EXPECTED}") from error
    shape = getattr(state.get("fc.weight"), "shape", None) if isinstance(state, dict) else None
    if shape != (1008, 2048):
        raise BadInputError(
            f"inception: fc.weight in {weights} is {shape and tuple(shape)}, expected (1008, 2048). {_EXPECTED}"
        )


_EXPECTED = "Expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth."
