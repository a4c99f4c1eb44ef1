"""Augmentation: pictures blurred as an autoencoder or a diffusion model may blur them."""

import random

from PIL import Image, ImageFilter


def augment(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture, in two of five cases blurred."""
    if rng.random() < 0.4:
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.0)))
    return picture
