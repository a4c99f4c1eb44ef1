"""An evaluation's pictures on disk: drawn once, in whatever order and by however many processes, and read again after.

A story's pictures lie in a folder of their own, beside a note that says with what they were drawn, how many tokens the
LLM emitted for each and how long each took. A story drawn with other settings or weights counts as missing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from minigpt5_core.rasters import open_picture

from ..common.progress import Progress
from .drawing import Drawn

NOTES = "drawn.json"
Story = TypeVar("Story")


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
            "texts": [one.text for one in drawn],
        }
        (fresh / NOTES).write_text(json.dumps(notes) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)

    def load(self, number: int) -> list[Drawn]:
        """A story that is there."""
        notes = self._notes(number)
        told = zip(notes["tokens"], notes["seconds"], notes["texts"], strict=True)
        return [
            Drawn(open_picture(self.picture(number, scene)).convert("RGB"), *each)
            for scene, each in enumerate(told)
        ]

    def _notes(self, number: int) -> dict:
        try:
            return json.loads((self.story(number) / NOTES).read_text())
        except (OSError, ValueError):
            return {}


def draw_missing(
    told: Sequence[tuple[int, Story]],
    seed: int,
    stride: int,
    ways: Mapping[str, Callable[[Story, int], Iterator[Drawn]]],
    galleries: Mapping[str, Gallery],
) -> None:
    """Story by story, each in all ways in turn, so that a busy machine slows none of them more than the others."""
    progress = Progress(len(told))
    for done, (number, story) in enumerate(told, 1):
        missing = [name for name in ways if not galleries[name].has(number)]
        pictures = 0
        for name in missing:
            drawn = list(ways[name](story, seed + stride * number))
            galleries[name].save(number, drawn)
            pictures += len(drawn)
        progress.update(done, pictures)


def write_stories(out: Path, name: str, texts: Sequence[Sequence[str]], gallery: Gallery) -> None:
    """Writes a row's stories as `NAME.jsonl`: text and picture items in order, a story a line."""
    lines = []
    for number, story in enumerate(texts):
        items: list[dict[str, str]] = []
        for index, text in enumerate(story):
            picture = gallery.picture(number, index).relative_to(out).as_posix()
            items += [{"text": text}] if text.strip() else []
            items.append({"picture": picture})
        lines.append(json.dumps({"id": gallery.story(number).name, "items": items}, ensure_ascii=False))
    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fingerprint(settings: dict, paths: Iterable[Path]) -> str:
    """Stands for settings and for the contents of all weights at or below `paths`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]
