"""A world as its file says it: who there is, what is carried, where and when, and in which words it is told.

`knights.toml` beside this file shows every table with comments; `checks.py` says what a file must hold.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from minigpt5_core.config import build
from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import text_in

SOUNDS_LIKE_A_CONSONANT = ("uni", "use", "usu", "eu", "one", "once", "ukulele")
SOUNDS_LIKE_A_VOWEL = ("hour", "honest", "heir", "honour")


@dataclass(frozen=True)
class State:
    """The truth of one scene, in the names of a world's tables; `prop` and `companion` may be absent."""

    hero: str
    place: str
    time: str
    prop: str | None = None
    companion: str | None = None

    def but(self, **changes: str | None) -> Self:
        """This state with some of it changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Place:
    """`where` completes "is ..."; `to` completes "walks ..."; `caption` is what a caption says of it."""

    where: tuple
    to: tuple
    caption: str


@dataclass(frozen=True)
class Time:
    """A time of day, or a weather. `opening`: sentences behind a story's first one; `comes`: how it begins later.

    `when` completes what a reader asks for ("a story about a fox ..."); `stated` follows where a request is worded as
    the opening itself, which does not say the time.
    """

    caption: str
    comes: tuple = ()
    opening: tuple = ("",)
    when: tuple = ("",)
    stated: str = ""


@dataclass(frozen=True)
class CaptionWords:
    """How a caption is put together; `prop` and `companion` are its parts where there is one."""

    scene: str = "a {hero} {prop} {place} {time} {companion}"
    prop: str = "with a {prop}"
    companion: str = "and a {companion}"


@dataclass(frozen=True)
class Wordings:
    """Sentences by what they tell: the opening, with or without something carried; each kind of change; a rest."""

    opening: tuple
    opening_with_prop: tuple
    rest: tuple
    move: tuple = ()
    find: tuple = ()
    swap: tuple = ()
    join: tuple = ()
    leave: tuple = ()


@dataclass(frozen=True)
class Requests:
    """What a reader may ask for: the whole story, and by what changes (none: the story's own sentence)."""

    opening: tuple = ("Tell me a story about {about}.", "A story about {about}.", "{about}")
    place: tuple = ()
    prop: tuple = ()
    time: tuple = ()
    companion: tuple = ()


@dataclass(frozen=True)
class World:
    """Everything a world's file says. Heroes, props and companions are {name: phrase of captions, without article}.

    Sentences call a hero by its name here, props and companions by their phrase. `names` are people's names by pronoun.
    A `held_out` share of the combinations of hero, prop and place is kept apart. `articles` are replacements made in
    every sentence in place of the rule for "a" and "an"; captions then stay as they are written.
    """

    heroes: dict
    props: dict
    places: dict
    times: dict
    names: dict
    wordings: Wordings
    companions: dict = field(default_factory=dict)
    caption: CaptionWords = CaptionWords()
    requests: Requests = Requests()
    held_out: float = 0.1
    articles: dict | None = None

    def caption_of(self, state: State) -> str:
        """Names everything that the picture shows, in a fixed order."""
        words = self.caption
        said = words.scene.format(
            hero=self.heroes[state.hero],
            prop=words.prop.format(prop=self.props[state.prop]) if state.prop else "",
            place=self.places[state.place].caption,
            time=self.times[state.time].caption,
            companion=words.companion.format(companion=self.companions[state.companion])
            if state.companion
            else "",
        )
        said = " ".join(said.split()).replace(" ,", ",")
        return said if self.articles is not None else with_articles(said)

    def mend(self, sentence: str) -> str:
        """A sentence with "a" and "an" as they should be."""
        if self.articles is None:
            return with_articles(sentence)
        for found, better in self.articles.items():
            sentence = sentence.replace(found, better)
        return sentence

    def holds_out(self, state: State) -> bool:
        """Whether the hero, prop and place of a scene are one of the combinations never trained on."""
        if state.prop is None:
            return False
        digest = hashlib.sha256(f"{state.hero}/{state.prop}/{state.place}".encode()).digest()
        return digest[0] < 256 * self.held_out

    def combinations(self) -> list[State]:
        """A state of each combination of hero, place and prop."""
        time = next(iter(self.times))
        return [
            State(hero, place, time, prop)
            for hero, place, prop in product(self.heroes, self.places, self.props)
        ]

    def facts(self) -> dict[str, tuple]:
        """What each fact of a state can be, in the file's order; None for nothing carried, nobody along."""
        return {
            "hero": tuple(self.heroes), "prop": (None, *self.props), "place": tuple(self.places),
            "time": tuple(self.times), "companion": (None, *self.companions),
        }  # fmt: skip

    def one_fact_apart(self, state: State) -> dict[str, list[State]]:
        """All states that differ from this one in a single fact, by that fact."""
        return {
            fact: [state.but(**{fact: value}) for value in values if value != getattr(state, fact)]
            for fact, values in self.facts().items()
        }


TABLES: dict[str, type] = {"caption": CaptionWords, "wordings": Wordings, "requests": Requests}
TABLES_OF_TABLES: dict[str, type] = {"places": Place, "times": Time}


def with_articles(text: str) -> str:
    """The text with "an" for "a" before a vowel's sound."""
    return re.sub(r"\b([Aa]) (\w+)", lambda found: f"{found[1]}{_n(found[2].lower())} {found[2]}", text)


def _n(word: str) -> str:
    vowel = word[0] in "aeiou" and not word.startswith(SOUNDS_LIKE_A_CONSONANT)
    return "n" if vowel or word.startswith(SOUNDS_LIKE_A_VOWEL) else ""


def read_world(path: Path) -> World:
    """The world of a TOML file, every key and type checked; `checks.load_world` checks the words as well.

    BadInputError says which table or key is wrong, what was expected, and how to mend it.
    """
    try:
        values = tomllib.loads(text_in(path))
    except OSError as error:
        raise BadInputError(f"World {path} cannot be read: {error.strerror}. Name a .toml file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInputError(
            f"World {path} is not valid TOML: {error}. See trainer/worlds/knights.toml."
        ) from error
    return make_world(values, str(path))


def make_world(values: dict[str, Any], source: str = "world") -> World:
    """The world of decoded TOML; BadInputError, opening with `source`, for an unknown key or a wrong type."""
    values = dict(values)
    for name in ("heroes", "props", "companions", "articles"):
        if name in values:
            values[name] = _words(values[name], f"{source}: [{name}]")
    for name, kind in TABLES.items():
        if name in values:
            values[name] = _table(kind, values[name], f"{source}: [{name}]")
    for name, kind in TABLES_OF_TABLES.items():
        if name in values:
            inner = _mapping(values[name], f"{source}: [{name}]").items()
            values[name] = {key: _table(kind, value, f"{source}: [{name}.{key}]") for key, value in inner}
    if "names" in values:
        names = _mapping(values["names"], f"{source}: [names]")
        values["names"] = {key: _sentences(some, f"{source}: [names] {key}") for key, some in names.items()}
    if type(values.get("held_out")) is int:
        values["held_out"] = float(values["held_out"])
    return build(World, values, source)


def _mapping(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInputError(f"{source}: found {value!r}, expected a table, such as {source.split(': ')[-1]}.")
    return value


def _words(value: Any, source: str) -> dict[str, str]:
    for name, phrase in (words := dict(_mapping(value, source))).items():
        if not isinstance(phrase, str):
            raise BadInputError(f'{source}: {name} is {phrase!r}, expected words: {name} = "...".')
    return words


def _table(kind: type, value: Any, source: str) -> Any:
    made = dict(_mapping(value, source))
    lists = {one.name for one in fields(kind) if one.type is tuple}
    for name in lists & set(made):
        made[name] = _sentences(made[name], f"{source} {name}")
    return build(kind, made, source)


def _sentences(value: Any, source: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadInputError(f'{source} is {value!r}, expected a list of texts: ["...", "..."].')
    return tuple(value)
