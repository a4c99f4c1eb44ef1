"""Pictures in: the image encoders that turn a picture into a few of the LLM's own vectors."""

from .encoder import ImageEncoder, ImageEncoderConfig
from .image_adapter import KEYS, ImageAdapterHeader, load_image_adapter, save_image_adapter
from .pictures import picture_tensor, to_square

__all__ = [
    "KEYS",
    "ImageAdapterHeader",
    "ImageEncoder",
    "ImageEncoderConfig",
    "load_image_adapter",
    "picture_tensor",
    "save_image_adapter",
    "to_square",
]
