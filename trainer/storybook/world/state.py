"""What the storybook's world is made of: 16 heroes, 10 props, 6 places, day and night, 4 companions.

Its words are in `storybook/world.toml`; here is how it looks. A scene's `State` is the truth a picture is scored by.
Everything is drawn from OpenMoji glyphs (CC BY-SA 4.0).
"""

from dataclasses import dataclass

from minigpt5_core.story.storybook import STORYBOOK

from ...worlds import world
from ...worlds.checks import load_world

WORLD = load_world(STORYBOOK / "world.toml")

HEROES = {
    "fox": "🦊", "bear": "🐻", "rabbit": "🐰", "cat": "🐱", "dog": "🐶", "panda": "🐼", "frog": "🐸", "tiger": "🐯",
    "lion": "🦁", "pig": "🐷", "mouse": "🐭", "cow": "🐮", "monkey": "🐵", "wolf": "🐺",
    "penguin": "🐧", "unicorn": "🦄",
}  # fmt: skip

PROP_GLYPHS = {
    "balloon": "🎈", "apple": "🍎", "present": "🎁", "key": "🔑", "ball": "⚽", "kite": "🪁", "umbrella": "☂",
    "crown": "👑", "carrot": "🥕", "cake": "🍰",
}  # fmt: skip
PROPS = {name: (phrase, PROP_GLYPHS[name]) for name, phrase in WORLD.props.items()}  # word -> (phrase, glyph)

COMPANIONS = {"butterfly": "🦋", "bee": "🐝", "snail": "🐌", "chick": "🐥"}


@dataclass(frozen=True)
class Place:
    """How a place is drawn: colours are (day, night) RGB; `scenery` holds (glyph, size in px) pairs that stand on the
    horizon."""

    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    scenery: tuple[tuple[str, int], ...]
    sea: bool = False


PLACES = {
    "forest": Place(
        ((120, 184, 92), (44, 84, 58)),
        (("🌳", 48), ("🌲", 48), ("🌳", 40)),
    ),
    "beach": Place(
        ((244, 220, 150), (128, 116, 96)),
        (("🌴", 56),),
        sea=True,
    ),
    "snow": Place(
        ((240, 246, 252), (132, 148, 180)),
        (("⛄", 40), ("🏔", 56), ("🌲", 40)),
    ),
    "city": Place(
        ((176, 176, 182), (74, 76, 88)),
        (("🏢", 48), ("🏬", 48), ("🏢", 40)),
    ),
    "desert": Place(
        ((232, 172, 100), (122, 82, 62)),
        (("🌵", 48), ("⛰", 56), ("🌵", 40)),
    ),
    "village": Place(
        ((164, 204, 116), (62, 100, 72)),
        (("🏠", 48), ("🌷", 24), ("🏠", 40)),
    ),
}

TIMES = ("day", "night")
FACTS = ("hero", "prop", "place", "time")  # what is measured of a scene
BY_TIME = {name: time.caption for name, time in WORLD.times.items()}


@dataclass(frozen=True)
class State(world.State):
    """The truth of one scene; `prop` and `companion` may be absent."""

    def caption(self) -> str:
        """Name everything the picture shows, in a fixed order."""
        return WORLD.caption_of(self)


def held_out(state: State) -> bool:
    """Whether the hero, prop and place of a scene are one of the combinations never trained on (one in ten)."""
    return WORLD.holds_out(state)
