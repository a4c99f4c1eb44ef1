"""The storybook's world as training data: captions and stories made by rule, so that every picture's truth is known.

A `DataSource` for each stage, for a stage differs in what it reads: captions (align), stories (finetune), each example
once (mapper).
"""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import Turn, chat_text

from ...data.source import (
    WHOLE,
    DataSource,
    Example,
    Features,
    OpenSource,
    Passage,
    PictureTarget,
    Shard,
    new_seed,
)
from ...llm.prefill_cache import caption_ids
from ...stages.align import AlignData
from ...stages.finetune import FinetuneData
from ...stages.mapper import MapperData
from ...training.config import StageRecipe
from .render import render
from .state import State
from .stories import TrueScene, stories, training_state
from .visual_turns import interleaved_turns, questions, scenes_to_generate

NAME = "storybook"
MOST_CAPTIONS = 8000  # of about 9,500 different ones that are not held out
PREVIEWS = (
    "a fox with a red balloon in the snow by day",
    "a bear with a golden key on the beach at night",
    "a panda in the city by day",
    "a unicorn with a purple umbrella in the forest at night and a butterfly",
    "a penguin with a red apple in the desert by day",
    "a mouse with a slice of cake in the village by day and a bee",
    "a lion with a football in the forest by day",
    "Mia the cat is in the snow. She has a golden crown. It is night.",
)


def open_storybook(recipe: StageRecipe) -> OpenSource:
    """Opens the world as the recipe's stage reads it."""

    def open_source(llm: FrozenLLM, features: Features | None) -> DataSource:
        data, seed = recipe.data, recipe.run.seed
        if isinstance(data, AlignData):
            return CaptionSource(llm, data.captions, data.stories, seed)
        if isinstance(data, FinetuneData):
            return StorySource(llm, data, seed)
        assert isinstance(data, MapperData)
        return OnceSource(llm, data, seed)

    return open_source


class WorldSource:
    """What all of them share: a name, and no place to keep, for a step's examples follow from the step."""

    name = NAME

    def passages(self) -> list[Passage] | None:
        """None: examples are drawn afresh each time."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class CaptionSource(WorldSource):
    """Stage 1: different captions, and stories whose every picture stands behind the story's text so far."""

    def __init__(self, llm: FrozenLLM, captions: int, count: int, seed: int) -> None:
        self.llm, self.seed = llm, seed
        self.states = list(caption_states(captions, seed).values())
        self.stories = list(islice(stories(seed), count))

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """Captions by themselves."""
        drawn = [picture_target(state, rng) for state in rng.choices(self.states, k=count)]
        return {"text": [caption_example(one) for index, one in enumerate(drawn) if shard.has(index)]}

    def captions(self, count: int) -> list[str]:
        """As many as were asked for, whatever is trained on."""
        return list(caption_states(count, self.seed))

    def passages(self) -> list[Passage] | None:
        """All captions, then all stories."""
        told = [story_passage(self.llm, scenes) for scenes in self.stories]
        return [caption_passage(self.llm, state) for state in self.states] + told

    def previews(self) -> list[list[Turn]]:
        """Fixed captions."""
        return [[Turn(text, "")] for text in PREVIEWS]


class StorySource(WorldSource):
    """Stage 2: whole stories, with pictures shown in a share of them; captions and questions beside them."""

    def __init__(self, llm: FrozenLLM, data: FinetuneData, seed: int) -> None:
        self.llm, self.data = llm, data
        self.stories = list(islice(stories(seed), data.stories))

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """`count` different stories; single captions and questions as the recipe says, each a batch of its own: padded
        to a story's length they would cost as much."""
        drawn = [(scenes, new_seed(rng)) for scenes in rng.sample(self.stories, count)]
        told = [
            story_example(self.llm, scenes, self.data.shown_share, random.Random(seed))
            for index, (scenes, seed) in enumerate(drawn)
            if shard.has(index)
        ]
        return {"text": told} | self._captions(rng, shard) | self._questions(rng, shard)

    def _captions(self, rng: random.Random, shard: Shard) -> dict[str, list[Example]]:
        if not self.data.captions:
            return {}
        alone = [picture_target(training_state(rng), rng) for _ in range(self.data.captions)]
        return {"caption_text": [caption_example(one) for index, one in enumerate(alone) if shard.has(index)]}

    def _questions(self, rng: random.Random, shard: Shard) -> dict[str, list[Example]]:
        if not (self.llm.has_vision and self.data.questions):
            return {}
        seeds = [new_seed(rng) for _ in range(self.data.questions)]
        mine = [random.Random(seed) for index, seed in enumerate(seeds) if shard.has(index)]
        return {
            "question_text": [Example(turns, []) for own in mine for turns in questions(self.llm, 1, own)]
        }

    def captions(self, count: int) -> list[str]:
        """Of the stories' pictures."""
        return [scene.caption for scenes in self.stories for scene in scenes][:count]

    def previews(self) -> list[list[Turn]]:
        """Four scenes each of the first held-out stories."""
        held_out = islice(stories(0, "test"), 2)
        return [[Turn(scene.request, scene.text) for scene in scenes[:4]] for scenes in held_out]


class OnceSource(WorldSource):
    """A mapper by itself: every story and caption once, in order."""

    def __init__(self, llm: FrozenLLM, data: MapperData, seed: int) -> None:
        self.llm, self.data, self.seed = llm, data, seed

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """The first `count` stories, and the recipe's captions."""
        told = islice(stories(self.seed), count)
        alone = caption_states(self.data.captions, self.seed).values()
        shown = self.data.shown_share
        made = [
            *(story_example(self.llm, scenes, shown, rng, seeded=False) for scenes in told),
            *(caption_example(picture_target(state)) for state in alone),
        ]
        return {"text": [one for index, one in enumerate(made) if shard.has(index)]}

    def captions(self, count: int) -> list[str]:
        """As many as were asked for, whatever is trained on."""
        return list(caption_states(count, self.seed))

    def previews(self) -> list[list[Turn]]:
        """None: nothing of the LLM is run while a mapper trains."""
        return []


def picture_target(state: State, rng: random.Random | None = None) -> PictureTarget:
    """A state of the storybook's world, drawn afresh each time."""
    return PictureTarget(state.caption(), lambda own: render(state, own), new_seed(rng) if rng else 0)


def caption_example(target: PictureTarget) -> Example:
    """A caption by itself, and its picture."""
    return Example([Turn(target.caption, "")], [target])


def story_example(
    llm: FrozenLLM, scenes: Sequence[TrueScene], shown_share: float, rng: random.Random, seeded: bool = True
) -> Example:
    """A whole story; to an LLM that sees, with pictures shown in a share of the stories. Targets that are not `seeded`
    get their seeds where they are used."""
    if llm.has_vision and rng.random() < shown_share:
        turns = interleaved_turns(llm, scenes, rng)
    else:
        turns = [Turn(scene.request, scene.text) for scene in scenes]
    drawn = scenes_to_generate(scenes, turns)
    return Example(turns, [picture_target(scene.state, rng if seeded else None) for scene in drawn])


def caption_states(count: int, seed: int) -> dict[str, State]:
    """`count` different captions with the states they describe, none held out."""
    if not 1 <= count <= MOST_CAPTIONS:
        raise BadInputError(f"captions is {count}; the world has room for 1 to {MOST_CAPTIONS}.")
    rng = random.Random(f"captions/{seed}")
    states: dict[str, State] = {}
    while len(states) < count:
        state = training_state(rng)
        states[state.caption()] = state
    return states


def caption_passage(llm: FrozenLLM, state: State) -> Passage:
    """One caption, one picture: stage 1 as published."""
    ids = caption_ids(llm, state.caption())
    return Passage(ids, [(len(ids), picture_target(state))])


def story_passage(llm: FrozenLLM, scenes: Sequence[TrueScene]) -> Passage:
    """A story's text with a picture behind each reply; no blocks in between, whose keys change as the rows learn."""
    turns = [Turn(scene.request, scene.text, picture=False) for scene in scenes]
    ids = llm.encode(chat_text(llm, turns))
    end = llm.chat.end
    pictures = []
    for index, scene in enumerate(scenes):
        start = len(llm.encode(chat_text(llm, [*turns[:index], Turn(scene.request)])))
        pictures.append((ids.index(end, start), picture_target(scene.state)))
    return Passage(ids, pictures)
