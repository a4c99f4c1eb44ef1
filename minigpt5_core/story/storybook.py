"""The default model that comes with this package, and the words of its world. No torch."""

import json
import re
import unicodedata
from functools import cache
from pathlib import Path

STORYBOOK = Path(__file__).resolve().parents[2] / "storybook"


def unknown_words(prompt: str) -> list[str]:
    """The prompt's words that the storybook cannot draw, in order, without characters' names.

    Its words are English: of words in other letters nothing can be said, for the LLM may know what they mean.
    """
    names = {
        name.lower()
        for name in re.findall(r"\b([A-Z]\w+) the\b|\b(?:called|named) (\w+)", prompt)
        for name in name
    }
    spoken = filter(_is_latin, re.findall(r"[^\W\d_]+", prompt.lower()))
    return [word for word in dict.fromkeys(spoken) if not names & {word} and not _is_known(word)]


def _is_latin(word: str) -> bool:
    return all(unicodedata.name(letter, "").startswith("LATIN") for letter in word)


def _is_known(word: str) -> bool:
    return len(word) < 3 or bool(_words() & {word, word.removesuffix("s"), word.removesuffix("es")})


@cache
def _words() -> frozenset[str]:
    world = json.loads((STORYBOOK / "world.json").read_text(encoding="utf-8"))
    return frozenset(world["words"]) | frozenset(world["plain_words"])
