"""What the storybook's world is made of: 16 heroes, 10 props, 6 places, day and night, 4 companions.

A scene's `State` is the truth a picture is scored by. Everything is drawn from OpenMoji glyphs (CC BY-SA 4.0).
"""

import hashlib
from dataclasses import asdict, dataclass

HEROES = {
    "fox": "🦊", "bear": "🐻", "rabbit": "🐰", "cat": "🐱", "dog": "🐶", "panda": "🐼", "frog": "🐸", "tiger": "🐯",
    "lion": "🦁", "pig": "🐷", "mouse": "🐭", "cow": "🐮", "monkey": "🐵", "wolf": "🐺",
    "penguin": "🐧", "unicorn": "🦄",
}  # fmt: skip

# word -> (noun phrase, glyph)
PROPS = {
    "balloon": ("red balloon", "🎈"),
    "apple": ("red apple", "🍎"),
    "present": ("wrapped present", "🎁"),
    "key": ("golden key", "🔑"),
    "ball": ("football", "⚽"),
    "kite": ("pink kite", "🪁"),
    "umbrella": ("purple umbrella", "☂"),
    "crown": ("golden crown", "👑"),
    "carrot": ("orange carrot", "🥕"),
    "cake": ("slice of cake", "🍰"),
}

COMPANIONS = {"butterfly": "🦋", "bee": "🐝", "snail": "🐌", "chick": "🐥"}


@dataclass(frozen=True)
class Place:
    """How a place is drawn and described.

    `where` completes "is ..."; `to` completes "walks ..."; colours are (day, night) RGB; `scenery` holds
    (glyph, size in px) pairs that stand on the horizon.
    """

    where: tuple[str, ...]
    to: tuple[str, ...]
    caption: str
    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    scenery: tuple[tuple[str, int], ...]
    sea: bool = False


PLACES = {
    "forest": Place(
        ("in the forest", "among the trees", "in the green woods"),
        ("into the forest", "to the woods"),
        "in the forest",
        ((120, 184, 92), (44, 84, 58)),
        (("🌳", 48), ("🌲", 48), ("🌳", 40)),
    ),
    "beach": Place(
        ("on the beach", "by the sea", "on the sandy beach"),
        ("to the beach", "down to the sea"),
        "on the beach",
        ((244, 220, 150), (128, 116, 96)),
        (("🌴", 56),),
        sea=True,
    ),
    "snow": Place(
        ("in the snow", "in a snowy forest", "in the deep white snow"),
        ("into the snow", "up to the snowy hills"),
        "in the snow",
        ((240, 246, 252), (132, 148, 180)),
        (("⛄", 40), ("🏔", 56), ("🌲", 40)),
    ),
    "city": Place(
        ("in the city", "in the busy city", "on a city street"),
        ("to the city", "into the big city"),
        "in the city",
        ((176, 176, 182), (74, 76, 88)),
        (("🏢", 48), ("🏬", 48), ("🏢", 40)),
    ),
    "desert": Place(
        ("in the desert", "in the hot desert", "among the cactuses"),
        ("into the desert", "to the wide desert"),
        "in the desert",
        ((232, 172, 100), (122, 82, 62)),
        (("🌵", 48), ("⛰", 56), ("🌵", 40)),
    ),
    "village": Place(
        ("in the village", "by the little house", "at home in the village"),
        ("to the village", "home to the little house"),
        "in the village",
        ((164, 204, 116), (62, 100, 72)),
        (("🏠", 48), ("🌷", 24), ("🏠", 40)),
    ),
}

TIMES = ("day", "night")
FACTS = ("hero", "prop", "place", "time")  # what is measured of a scene
BY_TIME = {"day": "by day", "night": "at night"}

NAMES = {
    "she": (
        "Mia", "Lily", "Ella", "Ruby", "Nora", "Zoe", "Ivy", "Rosa", "Daisy", "Luna", "Anna", "Maya",
    ),
    "he": (
        "Leo", "Max", "Tom", "Oscar", "Finn", "Sam", "Ben", "Hugo", "Theo", "Jack", "Noah", "Milo",
    ),
}  # fmt: skip

OBJECT_FORM = {"she": "her", "he": "him"}
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class State:
    """The truth of one scene; `prop` and `companion` may be absent."""

    hero: str
    place: str
    time: str
    prop: str | None = None
    companion: str | None = None

    def caption(self) -> str:
        """Name everything the picture shows, in a fixed order."""
        carried = f" with a {PROPS[self.prop][0]}" if self.prop else ""
        friend = f" and a {self.companion}" if self.companion else ""
        return f"a {self.hero}{carried} {PLACES[self.place].caption} {BY_TIME[self.time]}{friend}"

    def but(self, **changes: str | None) -> "State":
        """This state with some of it changed."""
        return State(**{**asdict(self), **changes})


def held_out(state: State) -> bool:
    """Whether the hero, prop and place of a scene are one of the combinations never trained on (one in ten)."""
    if state.prop is None:
        return False
    digest = hashlib.sha256(f"{state.hero}/{state.prop}/{state.place}".encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE
