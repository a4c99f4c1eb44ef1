"""What a world's words must hold so that its stories are true: every finding is said at once, with how to mend it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Formatter

from minigpt5_core.errors import BadInputError

from .tell import PRONOUNS
from .world import CaptionWords, World, read_world

SUBJECT = ("name", "Who", "who", "whom", "She", "she", "her", "their")
PLACED = (*SUBJECT, "where", "to")
# Which placeholders each list of wordings may use beside PLACED, and those one of which every sentence must have.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "opening": (("kind",), (("name",), ("kind",), ("where",))),
    "opening_with_prop": (("kind", "prop"), (("name",), ("kind",), ("where",), ("prop",))),
    "move": ((), (("to", "where"),)),
    "find": (("prop",), (("prop",),)),
    "swap": (("prop", "old"), (("prop",),)),
    "join": (("friend",), (("friend",),)),
    "leave": (("friend",), (("friend",),)),
    "rest": ((), ()),
}
REQUESTS = {"place": (), "prop": ("prop",), "time": ("time",), "companion": ("friend",)}


def load_world(path: Path) -> World:
    """The world of a TOML file, all of it checked; BadInputError names everything that is wrong with its words."""
    world = read_world(path)
    if troubles := list(find_troubles(world)):
        listed = "\n".join(f"  {trouble}" for trouble in troubles)
        raise BadInputError(
            f"World {path} cannot be told; trainer/worlds/knights.toml shows how each is written:\n{listed}"
        )
    return world


def find_troubles(world: World) -> Iterator[str]:
    """Everything that is wrong with a world's words, one after another: what was found, and what to do."""
    yield from _empty(world)
    yield from _shares(world)
    yield from _placeholders(world)
    yield from _collisions(world)
    yield from _untrue(world)


def _empty(world: World) -> Iterator[str]:
    for name in ("heroes", "props", "places", "times", "names"):
        if not getattr(world, name):
            yield f"[{name}] is empty. A story needs at least one."
    for table in ("heroes", "props", "companions"):
        for name, phrase in getattr(world, table).items():
            if not phrase.strip():
                yield f'[{table}] {name} has no word for the caption. Write what a picture shows: {name} = "..."'
    for where, some, may_be_blank in _lists(world):
        if not some:
            yield f"{where} is an empty list. Write at least one."
        elif not may_be_blank and any(not one.strip() for one in some):
            yield f"{where} holds an empty text. Write words, or leave it out."
    for table in ("places", "times"):
        for name, one in getattr(world, table).items():
            if not one.caption.strip():
                yield f'[{table}.{name}] caption is empty. Write what a picture shows of it, such as "at night".'


def _lists(world: World) -> Iterator[tuple[str, tuple, bool]]:
    """(where, list, whether texts in it may be empty) of all lists that are needed in this world or that are given."""
    needed = _needed(world)
    for name in WORDINGS:
        if (some := getattr(world.wordings, name)) or needed[name]:
            yield f"[wordings] {name}", some, False
    for name in ("opening", *REQUESTS):
        if (some := getattr(world.requests, name)) or name == "opening":
            yield f"[requests] {name}", some, False
    for name, place in world.places.items():
        yield f"[places.{name}] where", place.where, False
        yield f"[places.{name}] to", place.to, False
    for name, time in world.times.items():
        yield f"[times.{name}] opening", time.opening, True
        yield f"[times.{name}] when", time.when, True
        if time.comes or len(world.times) > 1:
            yield f"[times.{name}] comes", time.comes, False
    for pronoun, names in world.names.items():
        yield f"[names] {pronoun}", names, False


def _needed(world: World) -> dict[str, bool]:
    several = {"move": len(world.places) > 1, "swap": len(world.props) > 1}
    company = dict.fromkeys(("join", "leave"), bool(world.companions))
    return dict.fromkeys(WORDINGS, True) | several | company


def _shares(world: World) -> Iterator[str]:
    if not 0 <= world.held_out <= 0.5:
        yield f"held_out is {world.held_out:g}; it must be between 0 and 0.5, such as 0.1."
    if unknown := set(world.names) - set(PRONOUNS):
        yield f"[names] knows {', '.join(sorted(unknown))}; expected lists called {', '.join(PRONOUNS)}."


def _placeholders(world: World) -> Iterator[str]:
    for name, (own, needed) in WORDINGS.items():
        for sentence in getattr(world.wordings, name):
            yield from _check(f"[wordings] {name}", sentence, (*PLACED, *own), needed)
    for name, own in REQUESTS.items():
        for sentence in getattr(world.requests, name):
            yield from _check(f"[requests] {name}", sentence, (*PLACED, *own))
    for sentence in world.requests.opening:
        yield from _check("[requests] opening", sentence, ("about",), (("about",),))
    for name, time in world.times.items():
        for sentence in (*time.opening, *time.comes):
            yield from _check(f"[times.{name}]", sentence, (*PLACED, "time"))
    yield from _check_caption(world.caption)


def _check_caption(words: CaptionWords) -> Iterator[str]:
    facts = ("hero", "prop", "place", "time", "companion")
    yield from _check("[caption] scene", words.scene, facts, tuple((fact,) for fact in facts))
    yield from _check("[caption] prop", words.prop, ("prop",), (("prop",),))
    yield from _check("[caption] companion", words.companion, ("companion",), (("companion",),))


def _check(
    where: str, sentence: str, known: tuple[str, ...], needed: Iterable[tuple[str, ...]] = ()
) -> Iterator[str]:
    """The troubles of one sentence: placeholders that do not exist there, and those that it lacks."""
    try:
        parsed = list(Formatter().parse(sentence))
    except ValueError as error:
        yield f"{where} {sentence!r}: {error}. Write placeholders as {{name}}, and no other braces."
        return
    found = [name for _, name, form, change in parsed if name is not None and not form and not change]
    plain = len(found) == sum(name is not None for _, name, _, _ in parsed)
    unknown = sorted(set(found) - set(known))
    if unknown or not plain:
        what = ", ".join(f"{{{name}}}" for name in unknown) or "a placeholder with : or !"
        choice = ", ".join(f"{{{name}}}" for name in known)
        yield f"{where} {sentence!r}: {what} does not exist there. Known there: {choice}."
    for some in needed:
        if not set(some) & set(found):
            lacking = " or ".join(f"{{{name}}}" for name in some)
            yield f"{where} {sentence!r} lacks {lacking}: {_why(some[0])}"


def _why(placeholder: str) -> str:
    if placeholder in ("name", "kind"):
        return "it never names the hero, and later sentences only say she, he or it. Put it in."
    return "the picture would show what the story does not say. Put it in."


def _collisions(world: World) -> Iterator[str]:
    tables = ("heroes", "props", "companions")
    named = [(name.lower(), table) for table in tables for name in getattr(world, table)]
    people = [(name.lower(), "names") for names in world.names.values() for name in names]
    yield from _twice(named + people, "is a word of {}. Call one of them another way.")
    for table in tables:
        phrases = [(phrase.lower().strip(), table) for phrase in getattr(world, table).values()]
        yield from _twice(phrases, "is the caption of two: {}. No picture could tell them apart; reword one.")
    for table in ("places", "times"):
        phrases = [(one.caption.lower().strip(), table) for one in getattr(world, table).values()]
        yield from _twice(phrases, "is the caption of two: {}. No picture could tell them apart; reword one.")


def _twice(words: list[tuple[str, str]], told: str) -> Iterator[str]:
    for word, count in Counter(word for word, _ in words).items():
        if count > 1 and word:
            places = [f"[{table}]" for one, table in words if one == word]
            yield f"{word!r} {told.format(' and '.join(places))}"


def _untrue(world: World) -> Iterator[str]:
    """Sentences that name what is there in some stories only: it must come from a placeholder."""
    things = {name: table for table in ("heroes", "props", "companions") for name in getattr(world, table)}
    general = [
        *((f"[wordings] {name}", one) for name in WORDINGS for one in getattr(world.wordings, name)),
        *((f"[places.{name}]", one) for name, place in world.places.items() for one in place.where + place.to),
        *((f"[times.{name}]", one) for name, time in world.times.items() for one in time.opening + time.comes),
    ]  # fmt: skip
    for where, sentence in general:
        literal = re.sub(r"{.*?}", " ", sentence).lower()
        for name, table in things.items():
            if re.search(rf"\b{re.escape(name.lower())}\b", literal):
                yield (
                    f"{where} {sentence!r} says {name!r}, which is one of [{table}] and mostly not there. Use a "
                    "placeholder, or another word."
                )
