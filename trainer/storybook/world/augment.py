"""Pictures of the world as an autoencoder or a diffusion model may give them back: some are soft."""

import random

from PIL import Image, ImageFilter


def weather(picture: Image.Image, draw: random.Random) -> Image.Image:
    """The picture as it is, or blurred as an autoencoder may leave it."""
    if draw.random() < 0.4:
        return picture.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 2.0)))
    return picture
