"""Stories of a world: states that go from scene to scene, and sentences that say only what changes.

The first scene names the hero and its kind. Later sentences use the name or a pronoun and mention only what is new:
what is carried stays carried, a place stays until it is left. So a scene's own sentence does not say what to draw;
the story does.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minigpt5_core.errors import BadInputError
from minigpt5_core.story.prompts import NEXT

from .world import State, World

# What a pronoun is behind a verb, and of what belongs to someone.
PRONOUNS = {"she": ("her", "her"), "he": ("him", "his"), "it": ("it", "its")}
SPLITS = ("train", "validation", "test")
ASKED_SHARE = 0.5  # of the scenes after the first, whose reader asks for what then happens


@dataclass(frozen=True)
class WorldScene:
    """One scene with what is known about it: the reader's request, the sentence, the truth; and what has changed.

    `change` is "hero" for a story's first scene, else "place", "prop", "time", "companion" or "rest".
    """

    request: str
    text: str
    state: State
    change: str


def random_state(world: World, rng: random.Random) -> State:
    """Any state; three in four carry something, one in six has company, where the world knows any."""
    return State(
        hero=rng.choice(list(world.heroes)),
        place=rng.choice(list(world.places)),
        time=rng.choice(list(world.times)),
        prop=rng.choice(list(world.props)) if rng.random() < 0.75 else None,
        companion=rng.choice(list(world.companions)) if world.companions and rng.random() < 1 / 6 else None,
    )


class _Teller:
    """Words of one story: who it is about, and by which name or pronoun the next sentence calls them."""

    def __init__(self, world: World, rng: random.Random, kind: str) -> None:
        self.world, self.rng, self.kind = world, rng, kind
        self.pronoun = rng.choice(list(world.names))
        self.name = rng.choice(world.names[self.pronoun])

    def say(self, templates: Sequence[str], state: State, before: State | None = None) -> str:
        """One of the templates, filled in; the subject is the name or the pronoun."""
        named = self.rng.random() < 0.4
        world, place = self.world, self.world.places[state.place]
        subject, (them, their) = self.name if named else self.pronoun, PRONOUNS[self.pronoun]
        return world.mend(
            self.rng.choice(templates).format(
                name=self.name,
                kind=self.kind,
                She=self.pronoun.capitalize(),
                she=self.pronoun,
                her=them,
                their=their,
                Who=subject[0].upper() + subject[1:],
                who=subject,
                whom=self.name if named else them,
                where=self.rng.choice(place.where),
                to=self.rng.choice(place.to),
                prop=world.props.get(state.prop, ""),
                old=world.props.get(before.prop, "") if before else "",
                friend=world.companions.get(state.companion, ""),
                time=state.time,
            )
        )

    def openings(self, state: State) -> tuple:
        """The sentences that a story may begin with."""
        words = self.world.wordings
        return words.opening_with_prop if state.prop else words.opening


def _first_state(world: World, rng: random.Random) -> State:
    state = random_state(world, rng)
    return state.but(prop=state.prop if rng.random() < 0.5 else None, companion=None)


def _first_scene(teller: _Teller, state: State) -> WorldScene:
    text = teller.say(teller.openings(state), state)
    text = f"{text} {teller.say(teller.world.times[state.time].opening, state)}".strip()
    return WorldScene(_opening_request(teller, state, text), text, state, "hero")


def _opening_request(teller: _Teller, state: State, text: str) -> str:
    """What a reader may have asked for: the opening itself in other words, or only a part of it."""
    rng, time = teller.rng, teller.world.times[state.time]
    about = _about(teller, state)
    stated = f" {time.stated}" if time.stated else ""
    asked = [one.format(about=about) for one in teller.world.requests.opening]
    request = rng.choice([text, teller.say(teller.openings(state), state) + stated, *asked])
    request = teller.world.mend(request)
    return request[0].upper() + request[1:] if rng.random() < 0.8 else request


def _about(teller: _Teller, state: State) -> str:
    """Whom the story is about, by name or by kind, and some of what else there is: "Mia the fox in the forest"."""
    rng, world = teller.rng, teller.world
    carried = (
        world.caption.prop.format(prop=world.props[state.prop]) if state.prop and rng.random() < 0.7 else ""
    )
    where = rng.choice(world.places[state.place].where) if rng.random() < 0.7 else ""
    when = _choose(rng, world.times[state.time].when)
    named = f"{teller.name} the {teller.kind}"
    who = rng.choice((named, named, f"a {teller.kind}"))
    return " ".join(filter(None, (who, carried, where, when)))


def _choose(rng: random.Random, values: Sequence[str]) -> str:
    """One of them; a single one is not drawn."""
    return rng.choice(values) if len(values) > 1 else values[0]


def _change(world: World, rng: random.Random, state: State) -> tuple[str, State]:
    """What happens next: the kind of change, and the state after it."""
    others = {
        fact: [value for value in values if value is not None and value != getattr(state, fact)]
        for fact, values in world.facts().items()
    }
    weights = {"place": 30, "prop": 45 if state.prop is None else 8, "time": 20, "companion": 10}
    if not state.companion and not others["companion"]:
        weights["companion"] = 0
    possible = [weight if others[fact] or fact == "companion" else 0 for fact, weight in weights.items()]
    kind = rng.choices((*weights, "rest"), (*possible, 14))[0]
    if kind == "rest":
        return kind, state
    if kind == "companion" and state.companion:
        return kind, state.but(companion=None)
    if kind == "time":
        return kind, state.but(time=_choose(rng, others["time"]))
    return kind, state.but(**{kind: rng.choice(others[kind])})


def _wordings(world: World, kind: str, before: State, after: State) -> tuple:
    """The sentences that tell a change."""
    words = world.wordings
    if kind == "prop":
        return words.swap if before.prop else words.find
    if kind == "companion":
        return words.join if after.companion else words.leave
    return {"place": words.move, "time": world.times[after.time].comes, "rest": words.rest}[kind]


def _next_scene(teller: _Teller, before: State) -> WorldScene:
    rng, world = teller.rng, teller.world
    kind, after = _change(world, rng, before)
    wordings = _wordings(world, kind, before, after)
    leaving = kind == "companion" and after.companion is None
    shown = before if leaving else after
    text = teller.say(wordings, shown, before)
    if kind != "rest" and rng.random() < 0.35:
        text = f"{text} {teller.say(world.wordings.rest, after)}"
    request = NEXT
    if rng.random() < ASKED_SHARE:  # in words of its own, or as the story itself might say it
        known = getattr(world.requests, kind, ())
        own = known if not leaving and rng.random() < 0.5 else ()
        request = teller.say(own or wordings, shown, before)
    return WorldScene(request, text, after, kind)


def story(world: World, rng: random.Random) -> list[WorldScene]:
    """One story of 4 to 6 scenes."""
    state = _first_state(world, rng)
    teller = _Teller(world, rng, state.hero)
    scenes = [_first_scene(teller, state)]
    for _ in range(rng.randint(3, 5)):
        scenes.append(_next_scene(teller, scenes[-1].state))
    return scenes


def stories(world: World, seed: int, split: str = "train") -> Iterator[list[WorldScene]]:
    """An endless stream of stories, the same for the same seed.

    A `train` or `validation` story shows no held-out combination of hero, prop and place; a `test` story shows at least
    one. BadInputError for a split that this world has no stories for.
    """
    _check_split(world, split)
    rng = random.Random(f"{split}/{seed}")
    while True:
        scenes = story(world, rng)
        if any(world.holds_out(scene.state) for scene in scenes) == (split == "test"):
            yield scenes


def _check_split(world: World, split: str) -> None:
    if split not in SPLITS:
        raise BadInputError(f"split is {split!r}; it can be {', '.join(SPLITS)}.")
    held_out = [world.holds_out(state) for state in world.combinations()]
    if split == "test" and not any(held_out):
        raise BadInputError(
            f"None of this world's {len(held_out)} combinations of hero, prop and place is held out, so there is no "
            "test story. Add heroes, props or places, or set held_out higher (0.1 keeps one in ten apart)."
        )
    if split != "test" and all(held_out):
        raise BadInputError(
            f"All of this world's {len(held_out)} combinations of hero, prop and place are held out, so nothing is "
            "left to train on. Set held_out lower (0.1 keeps one in ten apart)."
        )
