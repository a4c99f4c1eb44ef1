"""Families that see a picture as one square of a fixed size: LLaVA (arXiv 2310.03744)."""

from abc import abstractmethod

from torch import Tensor
from transformers import PreTrainedModel

from .base import SeeingFamily
from .pictures import middle_square, normalised, resized, side_of


class SquareFamily(SeeingFamily):
    """One square a picture, whose tokens are plain vectors at plain positions: W = L."""

    def see(self, model: PreTrainedModel, picture: Tensor) -> Tensor:
        pixels = normalised(self.square(picture), self.processor)[None].to(model.device, model.dtype)
        return model.get_image_features(pixel_values=pixels).pooler_output[0]

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
