"""The form in which an LLM writes stories with captions: what it is asked for, and what a line of it must be.

Scene 1: Otto the bear finds a red boat by the river.
Picture: a brown bear with a small red boat by a river in the morning
Scene 2: ...
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from minigpt5_core.llm import FrozenLLM
from minigpt5_core.llm.chat import Exchange
from minigpt5_core.story.prompts import NEXT

SHORTEST, LONGEST = 12, 240  # characters of a text or caption
WHO = (
    "fox", "bear", "girl", "sailor", "knight", "dragon", "robot", "cat", "owl", "wizard", "mouse", "pirate", "boy",
    "horse", "ghost", "gardener", "elephant", "clown", "penguin", "astronaut", "giant", "baker", "wolf", "mermaid",
    "turtle", "musician",
)  # fmt: skip
WHAT = (
    "red balloon", "golden key", "small boat", "brass lantern", "old map", "blue umbrella", "green kite",
    "silver sword", "basket of apples", "long telescope", "little drum", "yellow bicycle", "treasure chest",
    "paper star", "warm scarf", "tall sunflower", "brown violin", "golden crown",
)  # fmt: skip
WHERE = (
    "in a forest", "on a beach", "in the snow", "in a big city", "at a lighthouse", "on a farm", "in a castle",
    "on an island", "in the mountains", "in a garden", "at a harbour", "in a desert", "in a small village",
    "by a river", "on a stormy sea", "in the rain", "under the stars",
)  # fmt: skip

ASK = (
    "Write a picture book story of {scenes} scenes about {subject}. Write two lines for each scene. First a line with "
    '"Scene", its number and a colon: one short sentence of the story. Then a line with "Picture:": a caption of all '
    "that its picture shows, the {who} and how it looks, what it carries, the place and the time of day. Say it all "
    "again in every caption. Write nothing else."
)


@dataclass(frozen=True)
class Subject:
    """What a story is asked to be about."""

    who: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{_a(self.who)} with {_a(self.what)} {self.where}"


@dataclass
class Draft:
    """A story as far as it is written: (text, caption) of each scene, and a text whose caption is due."""

    subject: Subject
    scenes: list[tuple[str, str]] = field(default_factory=list)
    text: str | None = None

    @property
    def label(self) -> str:
        """What the next line begins with."""
        return f"Scene {len(self.scenes) + 1}:" if self.text is None else "Picture:"

    def add(self, line: str) -> None:
        """Takes the next line; LineTrouble for one that does not hold the form."""
        words = check_words(line)
        named = self.text is not None or not self.scenes
        if named and not re.search(rf"\b{self.subject.who}", words, re.IGNORECASE):
            raise LineTrouble(f"{self.label} {words[:80]!r} does not name the {self.subject.who}")
        index = int(self.text is not None)
        said = {scene[index] for scene in (*self.scenes, *(one for _, shown in EXAMPLES for one in shown))}
        if words in said:
            raise LineTrouble(f"{self.label} {words[:80]!r} was said before")
        if self.text is None:
            self.text = words
        else:
            self.scenes.append((self.text, words))
            self.text = None

    def __str__(self) -> str:
        """Its lines, the last one begun by its label."""
        begun = f"Scene {len(self.scenes) + 1}: {self.text}\n" if self.text is not None else ""
        return "".join(f"{line}\n" for line in in_form(self.scenes)) + begun + self.label


EXAMPLES: tuple[tuple[Subject, tuple[tuple[str, str], ...]], ...] = (
    (
        Subject("bear", "red boat", "by a river"),
        (
            (
                "Otto the bear finds a red boat by the river.",
                "a brown bear with a small red boat by a river in the morning",
            ),
            (
                "He carries it home over the hills.",
                "a brown bear with a small red boat on green hills in the sunshine",
            ),
            (
                "Evening comes, and a duck says hello.",
                "a brown bear with a small red boat and a white duck on green hills at sunset",
            ),
            (
                "In the bathtub the boat sails at last.",
                "a brown bear with a small red boat in a bathtub at home at night",
            ),
        ),
    ),
    (
        Subject("camel", "wooden flute", "in a desert"),
        (
            ("Amira the camel lives among the dunes.", "a white camel among sand dunes under a blue sky"),
            (
                "One night she hears music and finds a flute.",
                "a white camel with a wooden flute among sand dunes at night",
            ),
            (
                "She plays, and a snake comes to dance.",
                "a white camel with a wooden flute and a green snake among sand dunes at night",
            ),
            (
                "Together they travel to the market.",
                "a white camel with a wooden flute and a green snake in a busy market at sunrise",
            ),
        ),
    ),
)


class LineTrouble(Exception):
    """Why a line does not hold the form."""


def draw_subject(rng: random.Random) -> Subject:
    """Any subject."""
    return Subject(rng.choice(WHO), rng.choice(WHAT), rng.choice(WHERE))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def in_form(scenes: Sequence[tuple[str, str]]) -> list[str]:
    """(text, caption) of each scene as the lines that an LLM is asked for."""
    pairs = [
        (f"Scene {number}: {text}", f"Picture: {caption}") for number, (text, caption) in enumerate(scenes, 1)
    ]
    return [line for pair in pairs for line in pair]


def request_text(llm: FrozenLLM, subject: Subject, scenes: int) -> str:
    """The request in the LLM's chat template, behind examples of the form, the reply still to be begun."""
    said: list[Exchange] = []
    for about, shown in EXAMPLES:
        told = [shown[index] for index in range(min(scenes, len(shown)))]
        said.append((_asked(about, len(told)), "\n".join(in_form(told))))
    return llm.chat.text("", [*said, (_asked(subject, scenes), None)])


def _asked(subject: Subject, scenes: int) -> str:
    return ASK.format(scenes=scenes, subject=subject, who=subject.who)


def check_words(line: str) -> str:
    """The words of a line behind its label; LineTrouble for one too short or long, or with anything but words."""
    words = line.strip(" \t\n*\"'")
    if not SHORTEST <= len(words) <= LONGEST or len(words.split()) < 3:
        raise LineTrouble(f"{words[:80]!r} has {len(words)} characters, expected {SHORTEST} to {LONGEST}")
    if re.search(r"[\[\]{}<>|]|\bScene \d|\bPicture:", words):
        raise LineTrouble(f"{words[:80]!r} holds brackets or another label")
    return words


def requests_of(subject: Subject, scenes: int) -> list[str]:
    """What a reader asks, scene by scene."""
    return [f"Tell me a story about {subject}."] + [NEXT] * (scenes - 1)
