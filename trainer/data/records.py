"""What every loader yields: a story as scenes of text and picture, or a row that is broken, with where and why."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minigpt5_core.rasters import UNREADABLE, as_seen, open_picture

LARGEST = 10_000  # pixels a side: beyond it a file is taken for broken, or for an attack


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded when asked for: a file, or a member of a shard with its `content`."""

    name: str
    path: Path | None = None
    content: bytes | None = None

    def open(self) -> Image.Image:
        """The whole picture, RGB, as a viewer shows it; BrokenPicture says what is wrong with it."""
        try:
            with open_picture(
                io.BytesIO(self.content) if self.content is not None else str(self.path)
            ) as image:
                if max(image.size) > LARGEST:
                    raise BrokenPicture(
                        f"{self.name} is {image.width} x {image.height}, at most {LARGEST} a side"
                    )
                return as_seen(image)
        except FileNotFoundError as error:
            raise BrokenPicture(f"{self.name} is missing") from error
        except UNREADABLE as error:
            raise BrokenPicture(f"{self.name} cannot be decoded: {error}") from error


class BrokenPicture(Exception):
    """A picture that is not there or not whole."""


@dataclass(frozen=True)
class Scene:
    """One text with the picture behind it. `speaker` is "assistant" where a text is told, "user" where it is asked.

    `caption` says what the picture shows, where the data says more than the text. A picture that is only `described`
    belongs there and is not at hand: `picture` is None.
    """

    text: str
    picture: Picture | None = None
    caption: str = ""
    speaker: str = "assistant"
    described: bool = False

    @property
    def pictured(self) -> bool:
        """Whether a picture belongs behind the text, at hand or described."""
        return self.picture is not None or self.described

    @property
    def shown(self) -> str:
        """What its picture shows, as far as the data says it."""
        return self.caption or self.text


@dataclass(frozen=True)
class Record:
    """A story, a dialogue, or one captioned picture; `where` names file and line or key."""

    id: str
    scenes: tuple[Scene, ...]
    where: str

    @property
    def pictures(self) -> list[Picture]:
        """All its pictures that are at hand, in order."""
        return [scene.picture for scene in self.scenes if scene.picture is not None]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used: where it stands and what is wrong with it."""

    where: str
    why: str


Row = Record | Broken
