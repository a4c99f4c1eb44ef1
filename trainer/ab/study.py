"""A study as it is kept: pairs of stories of two systems, and which of them is shown left, in and out of study.json.

Only the server reads study.json. What a rater's page is given is `Pair.shown`, which names no system.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import read_json

FORMAT_VERSION = 1
STUDY, ANSWERS, PICTURES = "study.json", "answers.sqlite", "pictures"
SIDES = ("left", "right")
CHOICES = ("left", "tie", "right")

# What the paper's raters judged (arXiv 2310.02239, the human evaluation on VIST).
QUESTIONS = {
    "language": ("Language continuity", "In which story does each text follow better from what came before?"),
    "image": ("Image quality", "In which story are the pictures clearer and a better fit for the story?"),
    "coherence": (
        "Multimodal coherence",
        "In which story do texts and pictures together make a more consistent whole?",
    ),
}

Item = dict[str, str]  # {"text": ..} or {"picture": the path of a file in the study's folder}


@dataclass(frozen=True)
class Pair:
    """One story as both systems told it; `shown_left` is "a" or "b", the system on the left side."""

    name: str
    story: str
    shown_left: str
    left: list[Item]
    right: list[Item]

    def shown(self) -> dict[str, Any]:
        """What the rater's page may know."""
        return {"pair": self.name, "left": self.left, "right": self.right}

    def winner(self, choice: str) -> str:
        """The system behind a rater's choice: "a", "b" or "tie"."""
        if choice == "tie":
            return choice
        return self.shown_left if choice == "left" else "ba"["ab".index(self.shown_left)]


@dataclass(frozen=True)
class Study:
    """The two systems' names by "a" and "b", the seed, and the pairs."""

    systems: dict[str, str]
    seed: int
    pairs: list[Pair]

    def to_json(self) -> str:
        """The text of study.json, the same for equal studies."""
        return (
            json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, ensure_ascii=False, indent=1)
            + "\n"
        )

    def fingerprint(self) -> str:
        """Stands for this study, so that an answer is never taken for that of another one."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def order_for(self, rater: str) -> list[Pair]:
        """The pairs in this rater's own order, the same on every day."""
        return random.Random(f"{self.seed} {rater}").sample(self.pairs, len(self.pairs))


def load_study(folder: Path) -> Study:
    """The study that `ab build` wrote into `folder`; BadInputError where there is none."""
    path = folder / STUDY
    try:
        values = read_json(path)
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise BadInputError(
                f"{path} has format_version {version!r}; this program reads {FORMAT_VERSION}."
            )
        return _checked(Study(values["systems"], values["seed"], [Pair(**pair) for pair in values["pairs"]]))
    except OSError as error:
        raise BadInputError(
            f"{path} cannot be read: {error.strerror}. Make a study with python -m trainer ab build."
        ) from error
    except BadInputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not what ab build wrote ({error!r:.100}). Take it from a backup or build the study anew."
        ) from error


def _checked(study: Study) -> Study:
    """The study; TypeError for one that somebody has edited into another shape."""
    texts = [*study.systems.values(), *(text for pair in study.pairs for text in _texts_of(pair))]
    sides = {pair.shown_left for pair in study.pairs}
    if study.systems.keys() != {"a", "b"} or type(study.seed) is not int or not sides <= {"a", "b"}:
        raise TypeError("expected two systems, a and b, and a seed")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected texts")
    return study


def _texts_of(pair: Pair) -> list[Any]:
    items = [item for side in SIDES for item in getattr(pair, side)]
    if not all(isinstance(item, dict) and item.keys() <= {"text", "picture"} for item in items):
        raise TypeError("expected items of a text or a picture")
    return [pair.name, pair.story, *(value for item in items for value in item.values())]
