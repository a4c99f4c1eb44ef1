"""The storybook's world as training data: captions and stories, drawn afresh each time."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.prompts import Turn, chat_text

from ...data.source import ALL, Example, Share, Shown, new_seed
from ...llm.prefill_cache import Passage, caption_ids
from .render import render
from .state import State
from .stories import TrueScene, stories, training_state
from .visual_turns import shown_turns, told_scenes

if TYPE_CHECKING:
    from ...stages.align import AlignRecipe


def shown(state: State, chance: random.Random | None = None) -> Shown:
    """A state of the storybook's world, drawn afresh each time."""
    return Shown(state.caption(), lambda own: render(state, own), new_seed(chance) if chance else 0)


def some_shown(llm: FrozenLLM, scenes: Sequence[TrueScene], share: float, draw: random.Random) -> list[Turn]:
    """A story of the world; to an LLM that sees, with pictures in a `share` of the stories."""
    if llm.sees and draw.random() < share:
        return shown_turns(llm, scenes, draw)
    return [Turn(scene.request, scene.text) for scene in scenes]


class StorybookSource:
    """Stories of the storybook's world, whole, with pictures shown in a share of them."""

    def __init__(self, llm: FrozenLLM, count: int, seed: int, shown_share: float) -> None:
        self.llm, self.shown_share = llm, shown_share
        self.told = list(islice(stories(seed), count))

    def draw(self, count: int, chance: random.Random, share: Share = ALL) -> list[Example]:
        drawn = [(scenes, new_seed(chance)) for scenes in chance.sample(self.told, count)]
        return [
            self._example(scenes, random.Random(seed))
            for index, (scenes, seed) in enumerate(drawn)
            if share.has(index)
        ]

    def _example(self, scenes: Sequence[TrueScene], chance: random.Random) -> Example:
        turns = some_shown(self.llm, scenes, self.shown_share, chance)
        return Example(turns, [shown(scene.state, chance) for scene in told_scenes(scenes, turns)])

    def captions(self, count: int) -> list[str]:
        return [scene.caption for scenes in self.told for scene in scenes][:count]

    def state_dict(self) -> dict[str, Any]:
        return {}  # a step's examples follow from the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


MOST_CAPTIONS = 8000  # of about 9,500 different ones that are not held out


def caption_states(count: int, seed: int) -> dict[str, State]:
    """`count` different captions with the states they describe, none held out."""
    if not 1 <= count <= MOST_CAPTIONS:
        raise BadInputError(f"captions is {count}; the world has room for 1 to {MOST_CAPTIONS}.")
    draw = random.Random(f"captions/{seed}")
    states: dict[str, State] = {}
    while len(states) < count:
        state = training_state(draw)
        states[state.caption()] = state
    return states


def passages(llm: FrozenLLM, recipe: "AlignRecipe") -> list[Passage]:
    """Everything stage 1 reads: captions, and stories where the recipe asks for them."""
    captions = caption_states(recipe.captions, recipe.seed).values()
    told = islice(stories(recipe.seed), recipe.stories)
    return [caption_passage(llm, state) for state in captions] + [story_passage(llm, s) for s in told]


def caption_passage(llm: FrozenLLM, state: State) -> Passage:
    """One caption, one picture: stage 1 as published."""
    ids = caption_ids(llm, state.caption())
    return Passage(ids, [(len(ids), state)])


def story_passage(llm: FrozenLLM, scenes: Sequence[TrueScene]) -> Passage:
    """A story's text with a picture behind each reply; no blocks in between, whose keys change as the rows learn."""
    turns = [Turn(scene.request, scene.text, picture=False) for scene in scenes]
    ids = llm.encode(chat_text(llm, turns))
    end = llm.tokenizer.eos_token_id
    pictures = []
    for index, scene in enumerate(scenes):
        start = len(llm.encode(chat_text(llm, [*turns[:index], Turn(scene.request)])))
        pictures.append((ids.index(end, start), scene.state))
    return Passage(ids, pictures)
