"""Stories of the storybook's world, as its file tells them, each scene with the state its picture is drawn from."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ...worlds import tell, world
from .state import WORLD, State, held_out


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
    return _drawn(tell.random_state(WORLD, rng))


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
    others = WORLD.one_fact_apart(state)
    fact = rng.choices(tuple(others), (2, 4, 2, 2, 1))[0]
    allowed = [_drawn(other) for other in others[fact] if not WORLD.holds_out(other)]
    return rng.choice(allowed) if allowed else change_a_fact(state, rng)


def stories(seed: int, split: str = "train") -> Iterator[list[TrueScene]]:
    """An endless stream of stories, the same for the same seed.

    A `train` or `validation` story shows no held-out combination of hero, prop and place; a `test` story shows at least
    one. Nothing is trained on the latter two.
    """
    for scenes in tell.stories(WORLD, seed, split):
        yield [_true_scene(scene) for scene in scenes]


def _true_scene(scene: tell.WorldScene) -> TrueScene:
    first = scene.change == "hero"
    names_prop = scene.change == "prop" or (first and bool(scene.state.prop))
    return TrueScene(scene.request, scene.text, _drawn(scene.state), names_kind=first, names_prop=names_prop)


def _drawn(state: world.State) -> State:
    """The same state, as pictures are drawn of it."""
    return State(**asdict(state))
