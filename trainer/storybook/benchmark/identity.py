"""How much a hero looks like itself from picture to picture: the pixels of its glyph, wherever it stands."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from ..world.render import CELL, HERO_COLUMNS, HERO_SIZE, SIZE, glyph
from ..world.state import HEROES


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


def identity(pictures: Sequence[Image.Image], hero: str, seen: Sequence[bool]) -> list[float]:
    """For each picture, the correlation of the hero's pixels with those of its first appearance.

    Each colour's mean is taken out first: a plain background is no likeness. NaN for the first appearance, and where
    the hero is not `seen`.
    """
    values, first = [], None
    for picture, there in zip(pictures, seen, strict=True):
        if not there:
            values.append(np.nan)
            continue
        pixels = hero_pixels(picture, hero)
        pixels = (pixels - pixels.mean(0)).ravel()
        values.append(np.nan if first is None else float(np.corrcoef(first, pixels)[0, 1]))
        first = pixels if first is None else first
    return values
