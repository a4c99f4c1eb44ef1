"""The layouts that people have on disk, each read row by row into records. A broken row is yielded as such."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import printable

from .captions import read_captions
from .folders import read_folder
from .records import Record, Row, Scene
from .rows import Trouble, captioned, json_of, lines_of, picture_of, row_of, words_of
from .shards import read_webdataset
from .vist import read_vist

SPEAKERS = ("user", "assistant")
Reader = Callable[[Path], Iterator[Row]]


def read(path: Path, layout: str) -> Iterator[Row]:
    """The rows of `path` (an annotation file or a folder) in their order; BadInputError when there is nothing to read.

    No more than a row is held at a time, but for the names in a plain folder.
    """
    if layout not in FORMATS:
        raise BadInputError(f"Unknown format {layout!r}. Known: {', '.join(FORMATS)}.")
    if not path.exists():
        raise BadInputError(f"There is nothing at {path}. {WANTED[layout]}")
    return FORMATS[layout](path)


# our own: interleaved JSON Lines


def read_jsonl(path: Path) -> Iterator[Row]:
    """A story a line: `{"id": .., "items": [{"text": ..}, {"picture": ..}, ..]}`, see story.schema.json.

    `{"caption": ..}` stands for a picture that is only described.
    """
    for where, line in lines_of(path):
        yield row_of(where, _interleaved, path.parent, line)


def _interleaved(folder: Path, line: str, where: str) -> Record:
    story = json_of(line)
    if not isinstance(story, dict) or not isinstance(story.get("items"), list) or not story["items"]:
        raise Trouble('expected {"id": .., "items": [..]} with at least one item')
    scenes: list[Scene] = []
    for item in story["items"]:
        _check_item(item)
        if "text" in item:
            scenes.append(Scene(words_of(item["text"]), speaker=item.get("speaker", "assistant")))
            continue
        speaker = item.get("speaker", scenes[-1].speaker if scenes else "assistant")
        text = ""
        if scenes and not scenes[-1].pictured and scenes[-1].speaker == speaker:
            text = scenes.pop().text
        scenes.append(_pictured(folder, item, text, speaker))
    return Record(printable(str(story.get("id", where))), tuple(scenes), where)


def _pictured(folder: Path, item: dict[str, Any], text: str, speaker: str) -> Scene:
    """A text with the picture behind it, or with what its picture would show."""
    if "picture" not in item:
        return Scene(text, None, words_of(item["caption"], "caption"), speaker, described=True)
    caption = words_of(item["caption"], "caption") if item.get("caption", "").strip() else ""
    return Scene(text, picture_of(folder, item["picture"]), caption, speaker)


def _check_item(item: Any) -> None:
    kinds = {"text", "picture"} & set(item if isinstance(item, dict) else ())
    if len(kinds) == 2 or not (kinds or isinstance(item, dict) and "caption" in item):
        raise Trouble(
            f"item {item!r:.200}: expected either text or picture, or caption for one that is not at hand"
        )
    if unknown := set(item) - {"text", "picture", "caption", "speaker"}:
        raise Trouble(
            f"item with unknown {', '.join(sorted(unknown))}; known: text, picture, caption, speaker"
        )
    if item.get("speaker", "assistant") not in SPEAKERS:
        raise Trouble(f"speaker {item['speaker']!r:.80}: expected user or assistant")
    if not isinstance(item.get("caption", ""), str):
        raise Trouble(f"caption {item['caption']!r:.80}: expected words")


# captioned pictures


def read_cc3m(path: Path) -> Iterator[Row]:
    """A tab-separated file with the columns `caption` and `image_path`."""
    lines = lines_of(path)
    head = _cells(next(lines, ("", ""))[1])
    if missing := [name for name in ("caption", "image_path") if name not in head]:
        raise BadInputError(f"{path}: its first line is {head}, and has no column {', '.join(missing)}.")
    for where, line in lines:
        yield row_of(where, _table_row, path.parent, head, _cells(line))


def _cells(line: str) -> list[str]:
    """Captions hold quotation marks as they are."""
    return line.rstrip("\r\n").split("\t")


def _table_row(folder: Path, head: list[str], cells: list[str], where: str) -> Record:
    if len(cells) > len(head):  # a tab inside a caption would move the picture's name
        raise Trouble(f"it has {len(cells)} columns, expected {len(head)}")
    row = dict(zip(head, cells + [""] * (len(head) - len(cells)), strict=True))
    return captioned(folder, row["image_path"], row["caption"], where)


# stories and dialogues


def read_mmdialog(path: Path) -> Iterator[Row]:
    """MMDialog: a conversation a line, its pictures ID.jpg in the file's folder; the first to speak is the user."""
    for where, line in lines_of(path):
        yield row_of(where, _conversation, path.parent, line)


def _conversation(folder: Path, line: str, where: str) -> Record:
    dialogue = json_of(line)
    if not isinstance(dialogue, dict) or not isinstance(dialogue.get("conversation"), list):
        raise Trouble('expected {"conversation_id": .., "conversation": [..]}')
    scenes: list[Scene] = []
    for number, turn in enumerate(dialogue["conversation"]):
        scenes += _said(folder, turn, SPEAKERS[number % 2])
    if not scenes:
        raise Trouble("the conversation is empty")
    return Record(printable(str(dialogue.get("conversation_id", where))), tuple(scenes), where)


def _said(folder: Path, turn: Any, speaker: str) -> list[Scene]:
    """One turn: its texts as one, and a scene for each picture, the first of which stands behind the text."""
    parts = turn.get("turn") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Trouble('expected turns as {"turn": [{"__TEXT__": ..}, {"__MEDIA__": ..}]}')
    text = " ".join(_spoken(part["__TEXT__"]) for part in parts if "__TEXT__" in part).strip()
    pictures = [picture_of(folder, f"{part['__MEDIA__']}.jpg") for part in parts if "__MEDIA__" in part]
    if not text and not pictures:
        raise Trouble("a turn is empty")
    first, rest = (pictures[0], pictures[1:]) if pictures else (None, [])
    return [Scene(text, first, speaker=speaker), *(Scene("", each, speaker=speaker) for each in rest)]


def _spoken(text: Any) -> str:
    """What was said, which may be nothing beside a picture."""
    return "" if isinstance(text, str) and not text.strip() else words_of(text)


FORMATS: dict[str, Reader] = {
    "folder": read_folder,
    "jsonl": read_jsonl,
    "cc3m": read_cc3m,
    "webdataset": read_webdataset,
    "vist": read_vist,
    "mmdialog": read_mmdialog,
    "captions": read_captions,
}
WANTED = {
    "folder": "Give a folder of pictures, each with its caption in a .txt or .caption of the same name.",
    "jsonl": 'Give a .jsonl file with a story a line: {"items": [{"text": ..}, {"picture": ..}]}.',
    "cc3m": "Give a .tsv file with the columns caption and image_path.",
    "webdataset": "Give a .tar shard, or a folder of shards.",
    "vist": "Give SPLIT_cleaned.json, with SPLIT_image_mapping.json and the pictures beside it.",
    "mmdialog": "Give conversations.jsonl, with its pictures beside it.",
    "captions": "Give a .txt with a caption a line, or a .csv, .tsv, .jsonl or .parquet with a column caption, text or "
    "prompt.",
}


def holds_pictures(path: Path, layout: str) -> bool:
    """Whether there is a picture file in a data set, whose usable rows may have them described at best.

    Reads as far as the first one; BadInputError when there is nothing to read.
    """
    return any(isinstance(row, Record) and row.pictures for row in read(path, layout))
