"""Writes the layouts that the trainer reads: the storybook's stories, to try a format with."""

import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path

from PIL import Image

from minigpt5_core.errors import BadInputError

from .render import render
from .stories import TrueScene, stories

Story = Sequence[TrueScene]


def export_stories(
    layout: str, count: int, seed: int, out: Path, split: str = "train", captions_only: bool = False
) -> Path:
    """Writes `count` of the storybook's stories with their pictures below `out`; returns the path to read them from.

    Layouts of captioned pictures hold a row a scene, with its full caption. With `captions_only` the pictures are
    described, and none is drawn; BadInputError for a layout that has no way to say that.
    """
    writers = DESCRIBERS if captions_only else WRITERS
    if layout not in WRITERS:
        raise BadInputError(f"Unknown format {layout!r}. Known: {', '.join(WRITERS)}.")
    if layout not in writers:
        raise BadInputError(
            f"--captions-only: {layout} has no rows without pictures. Formats that do: {', '.join(DESCRIBERS)}."
        )
    if out.exists() and any(out.iterdir()):
        raise BadInputError(f"{out} is not empty. Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    return writers[layout](list(islice(stories(seed, split), count)), seed, out)


def picture_of(seed: int, number: int, index: int, scene: TrueScene) -> Image.Image:
    """A scene's picture, the same in every layout."""
    return render(scene.state, random.Random(f"export/{seed}/{number}/{index}"))


def _scenes(all_stories: Sequence[Story], seed: int) -> Iterator[tuple[str, TrueScene, Image.Image]]:
    for number, story in enumerate(all_stories):
        for index, scene in enumerate(story):
            yield f"{number:05}_{index}", scene, picture_of(seed, number, index, scene)


def _save_all(all_stories: Sequence[Story], seed: int, folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, _, picture in _scenes(all_stories, seed):
        # the options are for .jpg; .png ignores them
        picture.save(folder / f"{name}{suffix}", quality=95, subsampling=0)


def _jsonl(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    _save_all(all_stories, seed, out / "pictures", ".png")
    return _interleaved(
        all_stories, out, lambda number, index: {"picture": f"pictures/{number:05}_{index}.png"}
    )


def _described(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    return _interleaved(all_stories, out, lambda number, index: {})


def _interleaved(
    all_stories: Sequence[Story], out: Path, picture: Callable[[int, int], dict[str, str]]
) -> Path:
    lines = []
    for number, story in enumerate(all_stories):
        items: list[dict[str, str]] = []
        for index, scene in enumerate(story):
            items += [
                {"text": scene.request, "speaker": "user"},
                {"text": scene.text},
                picture(number, index) | {"caption": scene.caption},
            ]
        lines.append(json.dumps({"id": f"{number:05}", "items": items}, ensure_ascii=False))
    return _write(out / "stories.jsonl", lines)


def _captions(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    return _write(out / "captions.txt", [scene.caption for story in all_stories for scene in story])


def _folder(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    _save_all(all_stories, seed, out, ".png")
    for name, scene, _ in _scenes(all_stories, seed):
        (out / f"{name}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    return out


def _cc3m(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    _save_all(all_stories, seed, out / "pictures", ".png")
    lines = [f"{scene.caption}\tpictures/{name}.png" for name, scene, _ in _scenes(all_stories, seed)]
    return _write(out / "captions.tsv", ["caption\timage_path", *lines])


def _webdataset(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    for shard in range(0, len(all_stories), 1000):
        with tarfile.open(out / f"{shard // 1000:05}.tar", "w") as file:
            for name, scene, picture in _scenes(all_stories[shard : shard + 1000], seed):
                content = BytesIO()
                picture.save(content, "PNG")
                _add(file, f"{shard}-{name}.png", content.getvalue())
                _add(file, f"{shard}-{name}.txt", scene.caption.encode())
    return out


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, BytesIO(content))


def _vist(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    _save_all(all_stories, seed, out / "images", ".png")
    rows = {
        f"{number:05}": [
            {"caption": scene.text, "image_id": f"{number:05}_{index}", "sequence_index": index}
            for index, scene in enumerate(story)
        ]
        for number, story in enumerate(all_stories)
    }
    files = {row["image_id"]: f"images/{row['image_id']}.png" for story in rows.values() for row in story}
    (out / "train_image_mapping.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    return _write(out / "train_cleaned.json", [json.dumps(rows, ensure_ascii=False, indent=1)])


def _mmdialog(all_stories: Sequence[Story], seed: int, out: Path) -> Path:
    _save_all(all_stories, seed, out, ".jpg")
    lines = []
    for number, story in enumerate(all_stories):
        turns: list[dict] = []
        for index, scene in enumerate(story):
            answer = [{"__TEXT__": scene.text}, {"__MEDIA__": f"{number:05}_{index}"}]
            turns += [{"turn": [{"__TEXT__": scene.request}]}, {"turn": answer}]
        lines.append(json.dumps({"conversation_id": number, "conversation": turns}, ensure_ascii=False))
    return _write(out / "conversations.jsonl", lines)


def _write(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


Writer = Callable[[Sequence[Story], int, Path], Path]
WRITERS: dict[str, Writer] = {
    "folder": _folder,
    "jsonl": _jsonl,
    "cc3m": _cc3m,
    "webdataset": _webdataset,
    "vist": _vist,
    "mmdialog": _mmdialog,
    "captions": _captions,
}
DESCRIBERS: dict[str, Writer] = {"jsonl": _described, "captions": _captions}
