"""How much a hero looks like itself from picture to picture: the pixels of its glyph, wherever it stands."""

from functools import cache

import numpy as np
from PIL import Image

from .render import CELL, HERO_COLUMNS, HERO_SIZE, SIZE, glyph
from .world import HEROES


@cache
def _opaque(hero: str) -> np.ndarray:
    """Which of the glyph's pixels are its own, (side, side)."""
    mask: np.ndarray = np.asarray(glyph(HEROES[hero], HERO_SIZE))[..., 3] > 127
    return mask


def hero_pixels(picture: Image.Image, hero: str) -> np.ndarray:
    """The (n, 3) pixels of the place where the hero's glyph fits best."""
    mask = _opaque(hero)
    drawn = np.asarray(glyph(HEROES[hero], HERO_SIZE))[..., :3][mask].astype(float)
    places = [_region(picture, column)[mask].astype(float) for column in HERO_COLUMNS]
    return min(places, key=lambda pixels: float(np.square(pixels - drawn).mean()))


def _region(picture: Image.Image, column: int) -> np.ndarray:
    left, bottom = CELL * column, SIZE - CELL
    return np.asarray(picture.crop((left, bottom - HERO_SIZE, left + HERO_SIZE, bottom)))


def identity(pictures: list[Image.Image], hero: str) -> list[float]:
    """For each picture, the correlation of the hero's pixels with those of the first one; NaN for the first."""
    pixels = [hero_pixels(picture, hero).ravel() for picture in pictures]
    return [np.nan, *(float(np.corrcoef(pixels[0], later)[0, 1]) for later in pixels[1:])]
