"""Tasks: how a record becomes one sequence for the LLM, worded afresh each time (arXiv 2310.02239, section 4).

Each takes a record and gives the turns, and the scenes whose pictures the voken blocks among them ask for; None for
a record it has no use for. Pictures that stand before are given as a reader would give them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt5_core.story.prompts import LOOK, NEXT, Turn

from .records import Picture, Record, Scene

HISTORY = 3  # turns of a dialogue that are kept, as published: an exchange and the question


@dataclass(frozen=True)
class Task:
    """How often a task is drawn beside the others, and its wordings (empty: the pack's own)."""

    weight: float = 1.0
    wordings: tuple = ()


@dataclass(frozen=True)
class Tools:
    """What a task is made with. `see` gives what stands for a picture that is shown, such as its image tokens; None
    for an LLM that does not see.

    With `feed_back` the LLM is shown the pictures its own blocks have asked for.
    """

    rng: random.Random
    wordings: Sequence[str]
    see: Callable[[Picture], Any]
    feed_back: bool = False

    def wording(self, own: str) -> str:
        """One of the wordings, or the pack's own."""
        return self.rng.choice(list(self.wordings) or [own])


Made = tuple[list[Turn], list[Scene]]


def caption(record: Record, tools: Tools) -> Made | None:
    """A caption by itself, and its picture: stage 1."""
    pictured = [scene for scene in record.scenes if scene.pictured and scene.shown]
    if not pictured:
        return None
    scene = tools.rng.choice(pictured)
    words = " ".join((tools.wording(""), scene.shown)).strip()
    return [Turn(words, "")], [scene]


def story(record: Record, tools: Tools) -> Made | None:
    """The whole story in one sequence, with all its voken blocks: one pass of the LLM serves every picture."""
    turns: list[Turn] = []
    asked, drawn = "", []
    for scene in record.scenes:
        if scene.speaker == "user":
            turns += _given(Scene("", scene.picture), tools)
            asked = scene.text
            continue
        request = asked or (NEXT if turns else tools.wording(NEXT))
        shown = tools.see(scene.picture) if scene.picture and tools.feed_back else None
        turns.append(Turn(request, scene.text, picture=scene.pictured, image_tokens=shown))
        drawn += [scene] if scene.pictured else []
        asked = ""
    return (turns, drawn) if drawn else None


def picture_from_text(record: Record, tools: Tools) -> Made | None:
    """The scenes so far, and the next one's text: its picture is asked for."""
    index = _chosen(record, tools, first=0)
    if index is None:
        return None
    scene = record.scenes[index]
    request = f"{tools.wording('Draw this scene:')} {scene.text}"
    return [*_history(record.scenes[:index], tools), Turn(request, "")], [scene]


def text_and_picture(record: Record, tools: Tools) -> Made | None:
    """The scenes so far: the next one is asked for, text and picture."""
    index = _chosen(record, tools, first=1)
    if index is None:
        return None
    scene = record.scenes[index]
    return [*_history(record.scenes[:index], tools), Turn(tools.wording(NEXT), scene.text)], [scene]


def understanding(record: Record, tools: Tools) -> Made | None:
    """The scenes so far and the next one's picture: its text is asked for."""
    index = _chosen(record, tools, first=1, at_hand=True)
    if index is None:
        return None
    scene = record.scenes[index]
    assert scene.picture is not None
    looked = Turn(LOOK, "", picture=False, image_tokens=tools.see(scene.picture))
    question = Turn(tools.wording("What happens in this scene?"), scene.text, picture=False)
    return [*_history(record.scenes[:index], tools), looked, question], []


def next_turn(record: Record, tools: Tools) -> Made | None:
    """A dialogue up to one of its turns, which is answered by its speaker; either speaker's turns are learned."""
    places = [i for i, scene in enumerate(record.scenes) if i and (scene.text or scene.pictured)]
    if not places:
        return None
    index = tools.rng.choice(places)
    answer = record.scenes[index]
    turns: list[Turn] = []
    asked = ""
    for scene in record.scenes[max(0, index - HISTORY) : index]:
        if scene.speaker == answer.speaker:
            shown = tools.see(scene.picture) if scene.picture else None
            turns.append(Turn(asked or NEXT, scene.text, picture=False, image_tokens=shown))
            asked = ""
        else:
            turns += _given(Scene("", scene.picture), tools)
            asked = f"{asked} {scene.text}".strip()
    turns.append(Turn(asked or tools.wording(NEXT), answer.text, picture=answer.pictured))
    return turns, [answer] if answer.pictured else []


def _chosen(record: Record, tools: Tools, first: int, at_hand: bool = False) -> int | None:
    """One of the scenes with text and picture, from the `first` on; `at_hand`: with a picture that can be shown."""
    places = [
        i
        for i, scene in enumerate(record.scenes)
        if i >= first and scene.text and (scene.picture if at_hand else scene.pictured)
    ]
    return tools.rng.choice(places) if places else None


def _history(scenes: Sequence[Scene], tools: Tools) -> list[Turn]:
    return [turn for scene in scenes for turn in _given(scene, tools)]


def _given(scene: Scene, tools: Tools) -> list[Turn]:
    """A scene that is given: its text as a request, its picture shown behind it where the LLM sees."""
    shown = tools.see(scene.picture) if scene.picture else None
    if not scene.text and shown is None:
        return []
    return [Turn(scene.text or LOOK, "", picture=False, image_tokens=shown)]


TASKS: dict[str, Callable[[Record, Tools], Made | None]] = {
    "caption": caption,
    "story": story,
    "picture_from_text": picture_from_text,
    "text_and_picture": text_and_picture,
    "understanding": understanding,
    "next_turn": next_turn,
}
