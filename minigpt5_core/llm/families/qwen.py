"""Families whose positions have three axes (time, row, column): Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923),
Qwen3-VL (2511.21631).

Shape letters as in `base`; D decoder layers to which image features are added once more (DeepStack, Qwen3-VL).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .base import Placed, VisionFamily, features
from .pictures import normalised, resized

MOST_PIXELS = 448 * 448  # about 200 or 250 image tokens


class QwenVL(VisionFamily):
    """Qwen2-VL and Qwen2.5-VL. A picture is (K, L + 2): each token comes with its row and column in the picture.

    Simplified: a picture keeps its proportions, but is scaled down to MOST_PIXELS where the processor would take more.
    """

    axes = 3
    before, after = "<|vision_start|>", "<|vision_end|>"

    def __init__(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, processor: dict[str, Any]
    ) -> None:
        super().__init__(config, tokenizer, processor)
        self.extra = 2

    def see(self, model: PreTrainedModel, picture: Tensor) -> Tensor:
        patch, merge = self.processor["patch_size"], self.processor["merge_size"]
        tall, wide = picture.shape[:2]
        height, width = fitting(tall, wide, patch * merge, *self._pixels())
        image = normalised(resized(picture, height, width), self.processor)
        grid = torch.tensor([[1, height // patch, width // patch]], device=model.device)
        answer = model.get_image_features(
            pixel_values=patches(image, patch, merge, self.processor["temporal_patch_size"]).to(
                model.device, model.dtype
            ),
            image_grid_thw=grid,
        )
        rows, columns = (torch.arange(int(side) // merge, device=model.device) for side in grid[0, 1:])
        return torch.cat((*self.vectors(answer), torch.cartesian_prod(rows, columns)), 1)

    def vectors(self, answer: Any) -> list[Tensor]:
        """The parts of a picture's tokens in the vision tower's answer, (K, L) each."""
        return [features(answer)[0]]

    def _pixels(self) -> tuple[int, int]:
        """The fewest and the most pixels of a picture, which older and newer processors call by different names."""
        size = self.processor.get("size") or {}
        fewest = self.processor.get("min_pixels") or size["shortest_edge"]
        most = min(self.processor.get("max_pixels") or size["longest_edge"], MOST_PIXELS)
        return min(fewest, most), most

    def widen(self, embedded: Tensor) -> Tensor:
        return functional.pad(embedded, (0, self.extra))

    def decoder_inputs(self, inputs: Tensor) -> dict[str, Any]:
        return {"inputs_embeds": inputs[..., : self.width]}

    def positions(self, length: int, placed: Sequence[Placed]) -> Tensor:
        """A picture's tokens share one time and count its rows and columns; text goes on after the longer side."""
        positions = torch.arange(length).repeat(3, 1)
        for start, picture in placed:
            cells = picture[:, -2:].long().cpu().T
            stop = start + len(picture)
            positions[:, start:stop] = positions[:, start : start + 1].clone()
            positions[1:, start:stop] += cells
            positions[:, stop:] -= len(picture) - int(cells.max()) - 1
        return positions


class Qwen3VL(QwenVL):
    """Qwen3-VL, whose first D decoder layers get more of a picture added to its tokens: a picture is (K, L + D L + 2).

    Text is padded with zeros there: adding them changes nothing.
    """

    def __init__(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, processor: dict[str, Any]
    ) -> None:
        super().__init__(config, tokenizer, processor)
        self.layers = len(config.vision_config.deepstack_visual_indexes)
        self.extra = self.layers * self.width + 2

    def vectors(self, answer: Any) -> list[Tensor]:
        if isinstance(answer, ModelOutput):
            return [*super().vectors(answer), *(layer[0] for layer in answer.deepstack_features)]
        pictures, layers = (
            answer  # transformers 4: the layers' are not cut into pictures, of which there is one
        )
        return [*super().vectors(pictures), *layers]

    def decoder_inputs(self, inputs: Tensor) -> dict[str, Any]:
        added = inputs[..., self.width : -2].flatten(0, 1).split(self.width, -1)
        everywhere = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        told = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(added)}
        return super().decoder_inputs(inputs) | told


def fitting(height: int, width: int, unit: int, fewest: int, most: int) -> tuple[int, int]:
    """Sides in multiples of `unit`, of about the same proportions, with `fewest` to `most` pixels in all."""

    def sides(scale: float, whole: Callable[[float], int]) -> tuple[int, int]:
        tall, wide = (max(1, whole(side * scale / unit)) * unit for side in (height, width))
        return tall, wide

    near = sides(1, round)
    if math.prod(near) > most:
        return sides(math.sqrt(most / (height * width)), math.floor)
    if math.prod(near) < fewest:
        return sides(math.sqrt(fewest / (height * width)), math.ceil)
    return near


def patches(image: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """(3, H, W) -> (patches, 3 * frames * patch * patch), those that become one image token together.

    The picture is a film of `frames` equal frames.
    """
    side = patch * merge
    cells = image.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, side, side)
    parts = cells.unflatten(4, (merge, patch)).unflatten(3, (merge, patch))
    parts = parts.permute(1, 2, 3, 5, 0, 4, 6)  # (rows, columns, merge, merge, 3, patch, patch)
    film = parts[..., None, :, :].expand(*parts.shape[:5], frames, *parts.shape[5:])
    return film.flatten(4).flatten(0, 3)
