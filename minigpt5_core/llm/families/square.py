"""Families that see a picture as one square of a fixed size.

LLaVA (arXiv 2310.03744), Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299), InternVL (arXiv 2504.10479).
"""

from abc import abstractmethod

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...vision.pictures import middle_square
from .base import VisionFamily, features
from .pictures import normalised, resized, side_of


class SquareFamily(VisionFamily):
    """One square a picture, whose tokens are plain vectors at plain positions: W = L."""

    def see(self, model: PreTrainedModel, picture: Tensor) -> Tensor:
        pixels = normalised(self.square(picture), self.processor).to(model.device, model.dtype)
        return features(model.get_image_features(pixel_values=self.batched(pixels)))[0]

    def batched(self, pixels: Tensor) -> Tensor:
        """One picture's pixels (3, side, side) in the shape that the model takes."""
        return pixels[None]

    @abstractmethod
    def square(self, picture: Tensor) -> Tensor:
        """(H, W, 3) in [0, 1] -> (3, side, side)."""


class Llava(SquareFamily):
    """LLaVA 1.5 and its like (model_type llava): the middle square, or the whole picture stretched where the image
    processor crops none (SigLIP's)."""

    def square(self, picture: Tensor) -> Tensor:
        crops = self.processor.get("do_center_crop", False)
        side = side_of(self.processor["crop_size" if crops else "size"])
        return resized(middle_square(picture) if crops else picture, side, side)


class Idefics3(SquareFamily):
    """Idefics3 and SmolVLM (model types idefics3, smolvlm): the whole picture stretched, as their processor does with
    `do_image_splitting` off. A reply ends with <end_of_utterance>, whatever the tokenizer says."""

    before, after = "<fake_token_around_image><global-img>", "<fake_token_around_image>"

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.eos_token = "<end_of_utterance>"

    def square(self, picture: Tensor) -> Tensor:
        side = side_of(self.processor["max_image_size"])
        return resized(picture, side, side)

    def batched(self, pixels: Tensor) -> Tensor:
        return pixels[None, None]  # a batch of stories, each with some pictures


class InternVL(SquareFamily):
    """InternVL in transformers' own layout (model type internvl, folders named -hf): the whole picture stretched, which
    is the one tile that its processor makes without `crop_to_patches`."""

    before, after = "<img>", "</img>"

    def square(self, picture: Tensor) -> Tensor:
        side = side_of(self.processor["size"])
        return resized(picture, side, side)
