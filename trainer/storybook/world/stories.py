"""Stories of the storybook's world: states that go from scene to scene, and sentences that say only what changes.

The first scene names the hero and its kind. Later sentences use the name or a pronoun and mention only what is new:
what is carried stays carried, a place stays until it is left. So a scene's own sentence does not say what to draw;
the story does.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from minigpt5_core.story.prompts import NEXT

from .state import COMPANIONS, HEROES, NAMES, OBJECT_FORM, PLACES, PROPS, TIMES, State, held_out

OPENINGS = (
    "{name} the {kind} wakes up {where}.", "{name} the {kind} is {where}.", "{name} the {kind} lives {where}.",
    "{name} the {kind} goes for a walk {where}.", "Once there was a {kind} called {name}. {she} was {where}.",
    "{name} the {kind} is playing {where}.", "Here is {name} the {kind}, {where}.",
)  # fmt: skip
OPENINGS_WITH_PROP = (
    "{name} the {kind} finds a {prop} {where}.", "{name} the {kind} is {where}. {she} has a {prop}.",
    "{name} the {kind} has a {prop}. {she} is {where}.", "{name} the {kind} wakes up {where} and finds a {prop}.",
    "Once there was a {kind} called {name}. {she} found a {prop} {where}.",
)  # fmt: skip
DAYTIME = ("The sun is shining.", "It is a bright day.", "What a sunny morning!", "The sky is blue.", "")
NIGHTTIME = ("The moon is up.", "It is a quiet night.", "The sky is dark.", "It is night.")
MOVES = (
    "{who} walks {to}.", "{who} runs {to}.", "Then {lower} goes {to}.", "{who} sets off {to}.",
    "{who} follows a path {to}.", "Soon {lower} is {where}.", "{who} travels {to}.",
)  # fmt: skip
FINDS = (
    "{who} finds a {prop}.", "Look, a {prop}! {who} picks it up.", "Someone gives {her} a {prop}.",
    "{who} sees a {prop} and takes it.", "{who} gets a {prop}.", "What is this? A {prop} for {her}!",
)  # fmt: skip
SWAPS = (
    "{who} leaves it behind and takes a {prop}.",
    "{who} trades it for a {prop}.",
    "Now {lower} has a {prop} instead.",
)
NIGHTFALL = (
    "Night falls.",
    "The sun goes down.",
    "It gets dark and the moon comes out.",
    "Evening turns to night.",
)
SUNRISE = ("The sun comes up.", "In the morning {lower} wakes up.", "A new day begins.", "The night is over.")
JOINS = ("A little {friend} comes along.", "{who} meets a {friend}.", "A {friend} says hello to {her}.")
LEAVES = ("The {friend} says goodbye.", "The {friend} has to go home.")
RESTS = (
    "{who} sings a song.", "{who} is very happy.", "{who} takes a little rest.", "{who} laughs and dances.",
    "{who} looks around.", "{who} tells a joke.", "What a lovely time!", "{who} smiles.",
)  # fmt: skip
ASKED_SHARE = 0.5  # of the scenes after the first, whose reader asks for what then happens
REQUESTS = {
    "place": ("{name} goes {to}.", "Now go {to}.", "Next: {where}.", "{to}"),
    "prop": ("{name} finds a {prop}.", "Give {name} a {prop}.", "There is a {prop}.", "a {prop}"),
    "time": ("It becomes {time}.", "Now it is {time}.", "{time}"),
    "companion": ("{name} meets a {friend}.", "A {friend} joins in.", "a {friend}"),
    "rest": (),
}


@dataclass(frozen=True)
class TrueScene:
    """One scene with what is known about it: the reader's request, the sentence, the picture's truth."""

    request: str
    text: str
    state: State
    names_kind: bool
    names_prop: bool

    @property
    def caption(self) -> str:
        """The full caption: everything the picture shows."""
        return self.state.caption()


def random_state(rng: random.Random) -> State:
    """Any state; three in four carry something, one in six has company."""
    return State(
        hero=rng.choice(list(HEROES)),
        place=rng.choice(list(PLACES)),
        time=rng.choice(TIMES),
        prop=rng.choice(list(PROPS)) if rng.random() < 0.75 else None,
        companion=rng.choice(list(COMPANIONS)) if rng.random() < 1 / 6 else None,
    )


def training_state(rng: random.Random) -> State:
    """Any state that is not held out."""
    while held_out(state := random_state(rng)):
        pass
    return state


def held_out_state(rng: random.Random) -> State:
    """Any state that is held out."""
    while not held_out(state := random_state(rng)):
        pass
    return state


def change_a_fact(state: State, rng: random.Random) -> State:
    """The state with one fact of it another; never a held-out combination."""
    known = {
        "hero": tuple(HEROES), "prop": (None, *PROPS), "place": tuple(PLACES), "time": TIMES,
        "companion": (None, *COMPANIONS),
    }  # fmt: skip
    fact = rng.choices(tuple(known), (2, 4, 2, 2, 1))[0]
    others = [state.but(**{fact: value}) for value in known[fact] if value != getattr(state, fact)]
    allowed = [other for other in others if not held_out(other)]
    return rng.choice(allowed) if allowed else change_a_fact(state, rng)


class _Teller:
    """Words of one story: who it is about, and by which name or pronoun the next sentence calls them."""

    def __init__(self, rng: random.Random, kind: str) -> None:
        self.rng, self.kind = rng, kind
        self.she = rng.choice(("she", "he"))
        self.name = rng.choice(NAMES[self.she])

    def say(self, templates: tuple[str, ...], state: State) -> str:
        """One of the templates, filled in; the subject is the name or the pronoun."""
        named = self.rng.random() < 0.4
        place = PLACES[state.place]
        sentence = self.rng.choice(templates).format(
            name=self.name,
            kind=self.kind,
            she=self.she.capitalize(),
            her=self.name if named else OBJECT_FORM[self.she],
            who=self.name if named else self.she.capitalize(),
            lower=self.name if named else self.she,
            where=self.rng.choice(place.where),
            to=self.rng.choice(place.to),
            prop=PROPS[state.prop][0] if state.prop else "",
            friend=state.companion or "",
            time=state.time,
        )
        return sentence.replace("a orange", "an orange")


def _first_state(rng: random.Random) -> State:
    state = random_state(rng)
    return state.but(prop=state.prop if rng.random() < 0.5 else None, companion=None)


def _first_scene(teller: _Teller, state: State) -> TrueScene:
    text = teller.say(OPENINGS_WITH_PROP if state.prop else OPENINGS, state)
    text = f"{text} {teller.say(NIGHTTIME if state.time == 'night' else DAYTIME, state)}".strip()
    return TrueScene(
        _opening_request(teller, state, text), text, state, names_kind=True, names_prop=bool(state.prop)
    )


def _opening_request(teller: _Teller, state: State, text: str) -> str:
    """What a reader may have asked for: the opening itself in other words, or only a part of it."""
    rng = teller.rng
    prop = f" with a {PROPS[state.prop][0]}" if state.prop and rng.random() < 0.7 else ""
    where = " " + rng.choice(PLACES[state.place].where) if rng.random() < 0.7 else ""
    when = " at night" if state.time == "night" else rng.choice(("", "", " on a sunny day"))
    who = rng.choice(
        (f"{teller.name} the {teller.kind}", f"{teller.name} the {teller.kind}", f"a {teller.kind}")
    )
    request = rng.choice(
        (
            text,
            teller.say(OPENINGS_WITH_PROP if state.prop else OPENINGS, state)
            + (" It is night." if when == " at night" else ""),
            f"Tell me a story about {who}{prop}{where}{when}.",
            f"A story about {who}{prop}{where}{when}.",
            f"{who}{prop}{where}{when}",
        )
    )
    request = request.replace("a orange", "an orange")
    return request[0].upper() + request[1:] if rng.random() < 0.8 else request


def _change(rng: random.Random, state: State) -> tuple[str, State]:
    """What happens next: the kind of change, and the state after it."""
    kind = rng.choices(
        ("place", "prop", "time", "companion", "rest"), (30, 45 if state.prop is None else 8, 20, 10, 14)
    )[0]
    if kind == "place":
        return kind, state.but(place=rng.choice([name for name in PLACES if name != state.place]))
    if kind == "prop":
        return kind, state.but(prop=rng.choice([name for name in PROPS if name != state.prop]))
    if kind == "time":
        return kind, state.but(time="day" if state.time == "night" else "night")
    if kind == "companion":
        return kind, state.but(companion=None if state.companion else rng.choice(list(COMPANIONS)))
    return kind, state


def _wordings(kind: str, before: State, after: State) -> tuple[str, ...]:
    """The sentences that tell a change."""
    if kind == "place":
        return MOVES
    if kind == "prop":
        return SWAPS if before.prop else FINDS
    if kind == "time":
        return SUNRISE if after.time == "day" else NIGHTFALL
    if kind == "companion":
        return JOINS if after.companion else LEAVES
    return RESTS


def _next_scene(teller: _Teller, before: State) -> TrueScene:
    rng = teller.rng
    kind, after = _change(rng, before)
    wordings = _wordings(kind, before, after)
    leaving = kind == "companion" and after.companion is None
    text = teller.say(wordings, before if leaving else after)
    if kind != "rest" and rng.random() < 0.35:
        text = f"{text} {teller.say(RESTS, after)}"
    request = NEXT
    if rng.random() < ASKED_SHARE:  # in words of its own, or as the story itself might say it
        own = REQUESTS[kind] if not leaving and rng.random() < 0.5 else ()
        request = teller.say(own or wordings, before if leaving else after)
    return TrueScene(request, text, after, names_kind=False, names_prop=kind == "prop")


def story(rng: random.Random) -> list[TrueScene]:
    """One story of 4 to 6 scenes."""
    state = _first_state(rng)
    teller = _Teller(rng, state.hero)
    scenes = [_first_scene(teller, state)]
    for _ in range(rng.randint(3, 5)):
        scenes.append(_next_scene(teller, scenes[-1].state))
    return scenes


def stories(seed: int, split: str = "train") -> Iterator[list[TrueScene]]:
    """An endless stream of stories, the same for the same seed.

    A `train` or `validation` story shows no held-out combination of hero, prop and place; a `test` story shows at least
    one. Nothing is trained on the latter two.
    """
    rng = random.Random(f"{split}/{seed}")
    while True:
        scenes = story(rng)
        if any(held_out(scene.state) for scene in scenes) == (split == "test"):
            yield scenes
