"""The layouts that people have on disk, each read row by row into records. A broken row is yielded as such."""

import csv
import errno
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from minigpt5_core.errors import BadInputError
from minigpt5_core.inside import named_file

from .captions import read_captions
from .records import Broken, Picture, Record, Row, Scene
from .rows import Trouble, json_of, lines_of, row_of, words_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
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


def _picture(folder: Path, name: Any) -> Picture:
    if not isinstance(name, str) or not name:
        raise Trouble(f"its picture is {name!r}, expected a file name")
    try:
        path = named_file(folder, name)
        there = path.is_file()
    except BadInputError as error:
        raise Trouble(f"picture {error}") from error
    except OSError as error:  # no name at all, such as one of 300 letters
        raise Trouble(f"picture {name!r:.80} cannot be looked for: {error.strerror}") from error
    if not there:
        raise Trouble(f"picture {name} is missing")
    return Picture(name, path)


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
    return Record(str(story.get("id", where)), tuple(scenes), where)


def _pictured(folder: Path, item: dict[str, Any], text: str, speaker: str) -> Scene:
    """A text with the picture behind it, or with what its picture would show."""
    if "picture" not in item:
        return Scene(text, None, words_of(item["caption"], "caption"), speaker, described=True)
    return Scene(text, _picture(folder, item["picture"]), item.get("caption", ""), speaker)


def _check_item(item: Any) -> None:
    kinds = {"text", "picture"} & set(item if isinstance(item, dict) else ())
    if len(kinds) == 2 or not (kinds or isinstance(item, dict) and "caption" in item):
        raise Trouble(
            f"item {item!r}: expected either text or picture, or caption for one that is not at hand"
        )
    if unknown := set(item) - {"text", "picture", "caption", "speaker"}:
        raise Trouble(
            f"item with unknown {', '.join(sorted(unknown))}; known: text, picture, caption, speaker"
        )
    if item.get("speaker", "assistant") not in SPEAKERS:
        raise Trouble(f"speaker {item['speaker']!r}: expected user or assistant")
    if not isinstance(item.get("caption", ""), str):
        raise Trouble(f"caption {item['caption']!r}: expected words")


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
    return _captioned(folder, row["image_path"], row["caption"], where)


def _captioned(folder: Path, name: Any, caption: Any, where: str) -> Record:
    text = words_of(caption, "caption")
    return Record(str(name), (Scene(text, _picture(folder, name)),), where)


def read_folder(path: Path) -> Iterator[Row]:
    """Pictures, each with its caption in a .txt of the same name; or all captions in metadata.jsonl or metadata.csv."""
    if not path.is_dir():
        raise BadInputError(f"{path} is no folder. {WANTED['folder']}")
    if (path / "metadata.jsonl").is_file():
        yield from _metadata(path, _json_rows(path / "metadata.jsonl"))
    elif (path / "metadata.csv").is_file():
        with (path / "metadata.csv").open(encoding="utf-8", newline="") as file:
            yield from _metadata(
                path, ((f"metadata.csv:{n}", row) for n, row in enumerate(csv.DictReader(file), 2))
            )
    else:
        for picture in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
            name = picture.relative_to(path).as_posix()
            yield row_of(name, _with_text, path, picture)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in lines_of(path):
        try:
            yield where, json_of(line)
        except Trouble as trouble:
            yield where, trouble


def _metadata(folder: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[Row]:
    """Rows with `file_name`, and the caption as `text` or `caption`, as `datasets` has them."""
    for where, row in rows:
        yield row_of(where, _of_metadata, folder, row)


def _of_metadata(folder: Path, row: Any, where: str) -> Record:
    if isinstance(row, Trouble):
        raise row
    if not isinstance(row, dict) or "file_name" not in row:
        raise Trouble("expected file_name, and text or caption")
    return _captioned(folder, row["file_name"], row.get("text", row.get("caption")), where)


def _with_text(folder: Path, picture: Path, where: str) -> Record:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise Trouble(f"its caption {file.name} is missing")
    return _captioned(folder, where, file.read_text(encoding="utf-8", errors="replace"), where)


def read_webdataset(path: Path) -> Iterator[Row]:
    """Tar shards, a picture (KEY.jpg) and its caption (KEY.txt, or `caption` in KEY.json) a sample."""
    for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        yield from _shard(shard)


def _shard(shard: Path) -> Iterator[Row]:
    """A shard is a local file and is opened as one: webdataset takes names for addresses, and `pipe:` for a command."""
    try:
        if not shard.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        with shard.open("rb") as file:
            yield from _samples(shard, file)
    except OSError as error:
        yield Broken(shard.name, f"the shard cannot be read: {error.strerror}")


def _samples(shard: Path, file: BinaryIO) -> Iterator[Row]:
    """What webdataset makes of an open shard: members are read in memory, links and devices among them passed by."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    troubles: list[Exception] = []

    def note(trouble: Exception) -> bool:
        troubles.append(trouble)
        return False  # nothing behind a broken place of a tar file can be trusted

    members = tar_file_expander([{"url": shard.name, "stream": file}], handler=note)
    for sample in group_by_keys(members, handler=note):
        yield row_of(f"{shard.name}:{sample['__key__']}", _sample, sample)
    for trouble in troubles:
        yield Broken(shard.name, f"the shard breaks off: {trouble}")


def _sample(sample: dict[str, Any], where: str) -> Record:
    suffix = next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in sample), None)
    if suffix is None:
        raise Trouble(f"it holds no picture ({', '.join(SUFFIXES)})")
    picture = Picture(f"{sample['__key__']}.{suffix}", content=sample[suffix])
    described = json_of(sample["json"]) if "json" in sample else {}
    caption = sample["txt"].decode("utf-8", "replace") if "txt" in sample else described.get("caption")
    return Record(sample["__key__"], (Scene(words_of(caption, "caption"), picture),), where)


# stories and dialogues


def read_vist(path: Path) -> Iterator[Row]:
    """VIST as MiniGPT-5 users have it: SPLIT_cleaned.json, and SPLIT_image_mapping.json beside it."""
    mapping_file = path.with_name(path.name.replace("_cleaned", "_image_mapping"))
    if mapping_file == path or not mapping_file.is_file():
        raise BadInputError(f"{path} needs {mapping_file.name} beside it. {WANTED['vist']}")
    _one_object(path)
    find, last = _files(mapping_file), "the first story"
    with path.open("rb") as file:
        try:
            for key, rows in ijson.kvitems(file, "", use_float=True):
                yield row_of(f"{path.name}:{key}", _vist_story, path, key, rows, find)
                last = key
        except ijson.JSONError as error:
            yield Broken(
                f"{path.name}: after {last}", f"the JSON is broken, what stands behind is lost: {error}"
            )


def _one_object(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(1000).lstrip()[:1]
    if first != b"{":
        raise BadInputError(f"{path} does not begin as one JSON object. {WANTED['vist']}")


def _files(mapping: Path) -> Callable[[str], str | None]:
    """Finds the file of an image id, in a database on disk: there may be five times as many as stories."""
    _one_object(mapping)
    database = sqlite3.connect("", check_same_thread=False)  # goes with this process
    database.execute("create table files (id text primary key, name text) without rowid")
    with mapping.open("rb") as file:
        try:
            rows = ((key, name if isinstance(name, str) else "") for key, name in ijson.kvitems(file, ""))
            database.executemany("insert or replace into files values (?, ?)", rows)
        except ijson.JSONError as error:
            raise BadInputError(f"{mapping} cannot be read: {error}.") from error

    def find(identity: str) -> str | None:
        row = database.execute("select name from files where id = ?", (identity,)).fetchone()
        return row[0] if row else None

    return find


def _vist_story(path: Path, key: str, rows: Any, find: Callable[[str], str | None], where: str) -> Record:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Trouble("expected a list of {caption, image_id, sequence_index}")
    scenes = []
    for row in sorted(rows, key=lambda row: row.get("sequence_index", 0)):
        if (name := find(identity := str(row.get("image_id")))) is None:
            raise Trouble(f"image id {identity} has no file in the mapping")
        scenes.append(Scene(words_of(row.get("caption"), "caption"), _picture(path.parent, name)))
    return Record(key, tuple(scenes), where)


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
    return Record(str(dialogue.get("conversation_id", where)), tuple(scenes), where)


def _said(folder: Path, turn: Any, speaker: str) -> list[Scene]:
    """One turn: its texts as one, and a scene for each picture, the first of which stands behind the text."""
    parts = turn.get("turn") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Trouble('expected turns as {"turn": [{"__TEXT__": ..}, {"__MEDIA__": ..}]}')
    text = " ".join(str(part["__TEXT__"]).strip() for part in parts if "__TEXT__" in part).strip()
    pictures = [_picture(folder, f"{part['__MEDIA__']}.jpg") for part in parts if "__MEDIA__" in part]
    if not text and not pictures:
        raise Trouble("a turn is empty")
    first, rest = (pictures[0], pictures[1:]) if pictures else (None, [])
    return [Scene(text, first, speaker=speaker), *(Scene("", each, speaker=speaker) for each in rest)]


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
    "folder": "Give a folder of pictures, each with its caption in a .txt of the same name.",
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
