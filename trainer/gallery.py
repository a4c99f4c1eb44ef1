"""An evaluation's pictures on disk: drawn once, in whatever order and by however many processes, and read again after.

A story's pictures lie in a folder of their own, beside a note that says with what they were drawn, how many tokens the
LLM emitted for each and how long each took. A story drawn with other settings or weights counts as missing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .storybook.rows import Drawn

NOTES = "drawn.json"


@dataclass(frozen=True)
class Gallery:
    """One row's stories in a folder, drawn with what `settings` stands for."""

    folder: Path
    settings: str

    def story(self, number: int) -> Path:
        """Where a story's pictures lie."""
        return self.folder / f"story_{number:03}"

    def picture(self, number: int, scene: int) -> Path:
        """Where one picture lies; scenes are counted from 0."""
        return self.story(number) / f"{scene + 1}.png"

    def has(self, number: int) -> bool:
        """Whether the story is there, drawn with these settings."""
        return self._notes(number).get("settings") == self.settings

    def save(self, number: int, drawn: Sequence[Drawn]) -> None:
        """Writes a story beside its place and moves it there."""
        place = self.story(number)
        fresh = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for scene, one in enumerate(drawn):
            one.picture.save(fresh / self.picture(number, scene).name)
        notes = {
            "settings": self.settings,
            "tokens": [one.llm_tokens for one in drawn],
            "seconds": [round(one.seconds, 4) for one in drawn],
        }
        (fresh / NOTES).write_text(json.dumps(notes) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)

    def load(self, number: int) -> list[Drawn]:
        """A story that is there."""
        notes = self._notes(number)
        return [
            Drawn(Image.open(self.picture(number, scene)).convert("RGB"), tokens, seconds)
            for scene, (tokens, seconds) in enumerate(zip(notes["tokens"], notes["seconds"], strict=True))
        ]

    def _notes(self, number: int) -> dict:
        try:
            return json.loads((self.story(number) / NOTES).read_text())
        except (OSError, ValueError):
            return {}


def fingerprint(settings: dict, paths: Iterable[Path]) -> str:
    """Stands for settings and for the contents of all weights at or below `paths`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]
