"""An evaluation's pictures on disk: drawn once, in whatever order and by however many processes, and read again after.

A strip of pictures is one PNG, which also says with what it was drawn, how many tokens the LLM emitted for each picture
and how long each took. One drawn with other settings or weights counts as missing.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from .progress import GAP, grid
from .storybook.rows import Drawn

KEY = "minigpt5.drawn"


@dataclass(frozen=True)
class Gallery:
    """The strips of one row in a folder, drawn with what `settings` stands for."""

    folder: Path
    settings: str

    def path(self, number: int) -> Path:
        """Where a story's strip lies."""
        return self.folder / f"story_{number:03}.png"

    def has(self, number: int) -> bool:
        """Whether the strip is there, whole, and drawn with these settings."""
        try:
            with Image.open(self.path(number)) as strip:
                return _notes(strip).get("settings") == self.settings
        except (OSError, UnidentifiedImageError):
            return False

    def save(self, number: int, drawn: Sequence[Drawn]) -> None:
        """Writes a strip beside its place and moves it there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = {
            "settings": self.settings,
            "tokens": [one.llm_tokens for one in drawn],
            "seconds": [round(one.seconds, 4) for one in drawn],
        }
        info = PngInfo()
        info.add_text(KEY, json.dumps(notes))
        fresh = self.path(number).with_suffix(f".{os.getpid()}.tmp")
        grid([one.picture for one in drawn], len(drawn)).save(fresh, "PNG", pnginfo=info)
        os.replace(fresh, self.path(number))

    def load(self, number: int) -> list[Drawn]:
        """The pictures of a strip that is there."""
        with Image.open(self.path(number)) as strip:
            notes = _notes(strip)
            pictures = cut(strip.convert("RGB"), len(notes["tokens"]))
        return [Drawn(*each) for each in zip(pictures, notes["tokens"], notes["seconds"], strict=True)]


def cut(strip: Image.Image, count: int) -> list[Image.Image]:
    """The pictures that `grid` laid side by side."""
    step = strip.width // count
    size = (step - GAP, strip.height - GAP)
    return [strip.crop((step * index, 0, step * index + size[0], size[1])) for index in range(count)]


def fingerprint(settings: dict, paths: Iterable[Path]) -> str:
    """Stands for settings and for the contents of all weights at or below `paths`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]


def _notes(strip: Image.Image) -> dict:
    if not isinstance(strip, PngImageFile):
        return {}
    strip.load()  # a file cut short is noticed here
    return json.loads(strip.text.get(KEY, "{}"))
