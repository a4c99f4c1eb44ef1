"""Pictures, stories and what is asked of installed packages, for the tests of the evaluation's metrics."""

import importlib
import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.metrics.table import Scene, ToldStory

CPU = torch.device("cpu")
SIDE = 28


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed: the extra `evaluate` has it")


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Blocks of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def save_processor(folder: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)


def three_stories() -> list[ToldStory]:
    """Six scenes with true pictures; one of them was not drawn, and one that needs no picture was."""
    told = [
        ("a", [("the cat is on the mat", 1, "the cat sat on the mat", 11), ("it sleeps", 2, "it sleeps", None)]),
        ("b", [("a red kite", 3, "a red kite", 13), ("it flies away", 4, "<unk> it flies", 14)]),
        ("c", [("snow falls", 5, "", 15), ("the end", 6, "no end", 16), ("good night", None, "good bye", 17)]),
    ]  # fmt: skip
    seeds = {None: None, **{seed: picture(seed) for seed in range(20)}}
    return [
        ToldStory(
            name,
            tuple(Scene(text, seeds[seed]) for text, seed, _, _ in scenes),
            tuple(Scene(text, seeds[seed]) for _, _, text, seed in scenes),
        )
        for name, scenes in told
    ]


def character_bleu(true: str, predicted: str, order: int) -> float:
    """By Papineni's formula, on characters."""
    precisions = []
    for length in range(1, order + 1):
        grams = [
            Counter(text[start : start + length] for start in range(len(text) - length + 1))
            for text in (true, predicted)
        ]
        precisions.append((grams[0] & grams[1]).total() / grams[1].total())
    return min(1.0, math.exp(1 - len(true) / len(predicted))) * math.prod(precisions) ** (1 / order)
