"""An evaluation's pictures on disk: drawn once, in whatever order and by however many processes, and read again after.

A story's pictures lie in a folder of their own, beside a note that says with what they were drawn, how many tokens the
LLM emitted for each and how long each took. A story drawn with other settings or weights counts as missing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState

from minigpt5_core.rasters import as_seen, open_picture

from ..common.progress import Progress
from .drawing import DrawnScene, System

NOTES = "drawn.json"
STRIDE = 1000  # between the seeds of two stories, and of two evaluations' first stories
Scene = TypeVar("Scene")


@dataclass(frozen=True)
class Gallery:
    """One system's stories in a folder, drawn with what `settings` stands for."""

    folder: Path
    settings: str = ""

    def story(self, number: int) -> Path:
        """Where a story's pictures lie."""
        return self.folder / f"story_{number:03}"

    def picture(self, number: int, scene: int) -> Path:
        """Where one picture lies; scenes are counted from 0."""
        return self.story(number) / f"{scene + 1}.png"

    def has(self, number: int) -> bool:
        """Whether the story is there, drawn with these settings."""
        return self._notes(number).get("settings") == self.settings

    def save(self, number: int, scenes: Sequence[DrawnScene]) -> None:
        """Writes a story beside its place and moves it there."""
        place = self.story(number)
        fresh = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for index, scene in enumerate(scenes):
            scene.picture.save(fresh / self.picture(number, index).name)
        notes = {
            "settings": self.settings,
            "tokens": [scene.llm_tokens for scene in scenes],
            "seconds": [round(scene.seconds, 4) for scene in scenes],
            "texts": [scene.text for scene in scenes],
        }
        (fresh / NOTES).write_text(json.dumps(notes) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)

    def load(self, number: int) -> list[DrawnScene]:
        """A story that is there."""
        notes = self._notes(number)
        scenes = zip(notes["tokens"], notes["seconds"], notes["texts"], strict=True)
        return [
            DrawnScene(as_seen(open_picture(self.picture(number, index))), *scene)
            for index, scene in enumerate(scenes)
        ]

    def load_all(self, count: int) -> list[list[DrawnScene]]:
        """The first `count` stories, all of which are there."""
        return [self.load(number) for number in range(count)]

    def _notes(self, number: int) -> dict:
        try:
            return json.loads((self.story(number) / NOTES).read_text())
        except (OSError, ValueError):
            return {}


def true_gallery(out: Path) -> Gallery:
    """Where an evaluation into `out` lays what each picture should show; it is written anew every time."""
    return Gallery(out / "pictures" / "true")


def draw_missing(
    processes: PartialState,
    stories: Sequence[Sequence[Scene]],
    seed: int,
    systems: Mapping[str, System[Scene]],
    galleries: Mapping[str, Gallery],
    stride: int = STRIDE,
) -> None:
    """This process's share of the stories, each by all systems whose gallery lacks it.

    Story by story, each by all systems in turn, so that a busy machine slows none of them more than the others. Story n
    is drawn with the seed `STRIDE * seed + stride * n`, whichever process draws it.
    """
    share = list(enumerate(stories))[processes.process_index :: processes.num_processes]
    progress = Progress(len(share))
    for done, (number, scenes) in enumerate(share, 1):
        pictures = 0
        for name in [name for name in systems if not galleries[name].has(number)]:
            drawn = list(systems[name](scenes, STRIDE * seed + stride * number))
            galleries[name].save(number, drawn)
            pictures += len(drawn)
        progress.update(done, pictures)


def write_stories(out: Path, name: str, texts: Sequence[Sequence[str]], gallery: Gallery) -> None:
    """Writes a system's stories as `NAME.jsonl`: text and picture items in order, a story a line."""
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
