"""A story as it is saved: a prompt, a seed and scenes, to and from story.json. No torch, no pictures in memory."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..files import restore
from ..texts import parse_json, text_in

FORMAT_VERSION = 1
FILE_NAME = "story.json"


@dataclass(frozen=True)
class Scene:
    """Its text, and the file name of its picture beside story.json (None: a scene without a picture)."""

    text: str
    picture: str | None = None

    def __post_init__(self) -> None:
        _check_type(self.text, str, "text")
        if self.picture is not None:
            _check_type(self.picture, str, "picture")
            _check_file_name(self.picture)


@dataclass(frozen=True)
class Story:
    """The opening, the seed (64 bits, unsigned) from which everything random follows, and the scenes so far."""

    prompt: str
    seed: int
    scenes: tuple[Scene, ...] = ()

    def __post_init__(self) -> None:
        _check_type(self.prompt, str, "prompt")
        _check_type(self.seed, int, "seed")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"The seed is {self.seed}; expected a whole number from 0 to 2**64 - 1.")

    def to_json(self) -> str:
        """The text of story.json, the same for equal stories."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Story":
        """The story in the text of a story.json; BadInputError for anything that `to_json` does not write."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise BadInputError(f"The story is not valid JSON: {error}.") from error
        _check_keys(values, ("format_version", "prompt", "seed", "scenes"), "the story")
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise BadInputError(
                f"The story has format_version {version!r}; this program reads {FORMAT_VERSION}."
            )
        _check_type(values["scenes"], list, "scenes")
        for number, scene in enumerate(values["scenes"], 1):
            _check_keys(scene, tuple(field.name for field in fields(Scene)), f"scene {number}")
        return cls(values["prompt"], values["seed"], tuple(Scene(**scene) for scene in values["scenes"]))


def load_story(path: Path) -> Story:
    """The story in a story.json, or in the folder that holds one; BadInputError names the file."""
    restore(path.parent if path.name == FILE_NAME else path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return Story.from_json(text_in(path))
    except OSError as error:
        raise BadInputError(
            f"Cannot read {path}: {error.strerror}. Expected a saved story's {FILE_NAME}."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"Cannot read {path}: it is not UTF-8 text. Expected a saved story.") from error
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error


def _check_keys(values: Any, expected: tuple[str, ...], where: str) -> None:
    _check_type(values, dict, where)
    unknown = sorted(set(values) - set(expected))
    missing = [key for key in expected if key not in values]
    if unknown or missing:
        trouble = [f"unknown key {key!r}" for key in unknown] + [f"missing key {key!r}" for key in missing]
        raise BadInputError(f"In {where}: {', '.join(trouble)}. Expected exactly {', '.join(expected)}.")


def _check_type(value: Any, expected: type, what: str) -> None:
    if not isinstance(value, expected) or isinstance(value, bool):
        raise BadInputError(f"{what} is {value!r:.60}; expected {_JSON_NAMES[expected]}.")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadInputError(f"{what} is {value!r:.60}, which is not valid Unicode; expected UTF-8 text.")


def _check_file_name(name: str) -> None:
    """BadInputError for a name that leads to another folder than story.json's, on any system."""
    if name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise BadInputError(
            f"picture is {name!r}; expected the name of a file beside {FILE_NAME}, such as scene_01.png."
        )


_JSON_NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
