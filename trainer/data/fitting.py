"""Examples longer than the LLM reads: what is left of them is what a telling would leave."""

import random

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import Turn, chat_prompt, fit_prompt

from .source import Example


def fits(llm: FrozenLLM, turns: list[Turn]) -> bool:
    """Whether the LLM can read all turns at once."""
    return chat_prompt(llm, turns).length <= llm.context


def fitted(llm: FrozenLLM, example: Example, rng: random.Random) -> Example | None:
    """The example's first turn and its latest ones, as many as the LLM reads; None where no use is left of it.

    A story of many pictures ends at one of them that is drawn, so that in time all its scenes are trained on.
    """
    turns = example.turns
    ends = [index + 1 for index, turn in enumerate(turns) if turn.picture]
    end = rng.choice(ends) if len(ends) > 1 else len(turns)
    try:
        dropped = set(fit_prompt(llm, turns[:end], 0).dropped)
    except BadInputError:  # even the first turn and the last are too long
        return None
    if (
        not turns[end - 1].picture and end - 2 in dropped
    ):  # a question about a picture that is not shown any more
        return None
    kept = [index for index in range(end) if index not in dropped]
    targets = dict(zip(ends, example.targets, strict=True))
    return Example(
        [turns[index] for index in kept], [targets[index + 1] for index in kept if index + 1 in targets]
    )
