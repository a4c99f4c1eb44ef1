"""Tar shards as webdataset has them: files of one name before their first dot stand together, one behind another."""

import errno
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import printable, text_of

from .records import Broken, Picture, Record, Row, Scene
from .rows import CAPTIONS, PICTURES, Trouble, is_hidden, json_of, row_of, words_of

SHARDS = (".tar", ".tar.gz", ".tgz")
AT_THE_END = 1 << 20  # bytes behind the last member that are looked at; tar fills up with some 10,000 zeros
Member = tuple[str, bytes]
Sample = tuple[
    str, dict[str, bytes]
]  # the name before the first dot, and what stands behind it by what is behind it


def read_webdataset(path: Path) -> Iterator[Row]:
    """Tar shards, a picture (KEY.jpg) and its caption (KEY.txt, or `caption` in KEY.json) a sample."""
    if not path.is_dir():
        yield from _shard(path)
        return
    shards = sorted(
        file for file in path.iterdir() if file.name.endswith(SHARDS) and not is_hidden((file.name,))
    )
    if not shards:
        raise BadInputError(
            f"{path} holds no shard ({', '.join(SHARDS)}). Give a .tar shard, or a folder of shards."
        )
    for shard in shards:
        yield from _shard(shard)


def _shard(shard: Path) -> Iterator[Row]:
    """A shard is a local file and is opened as one, whatever it is called."""
    where = printable(shard.name)
    try:
        if not shard.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        with shard.open("rb") as file:
            for key, parts in _samples(_members(file)):
                yield from _rows(where, key, parts)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        yield Broken(where, f"the shard breaks off: {error}")
    except OSError as error:
        yield Broken(where, f"the shard cannot be read: {error.strerror or error}")


def _members(file: BinaryIO) -> Iterator[Member]:
    """Files in an archive, read in memory; links, devices and what is hidden are passed by."""
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            opened = archive.extractfile(member) if member.isreg() else None
            if opened is not None and not is_hidden(PurePosixPath(member.name).parts):
                yield member.name, opened.read()
        _check_end(file, archive.offset)


def _check_end(file: BinaryIO, end: int) -> None:
    """tarfile takes a damaged header for the end of a plain archive, and leaves what stands behind the end unread."""
    file.seek(0)
    plain = file.read(2) not in (b"\x1f\x8b", b"BZ", b"\xfd7")
    file.seek(end)
    rest = file.read(AT_THE_END)
    if plain and not rest:
        raise tarfile.ReadError("it has no end mark, as a file that was cut short has none")
    if plain and rest.strip(b"\0"):
        raise tarfile.ReadError(
            f"behind {end:,} bytes a header is damaged, or another archive was laid behind this one"
        )


def _samples(members: Iterator[Member]) -> Iterator[Sample]:
    """Members of one key, as long as they stand together; a part that is there already begins another sample."""
    last, parts = "", dict[str, bytes]()
    for name, content in members:
        folder, slash, file = name.rpartition("/")
        stem, _, part = file.partition(".")
        key, part = folder + slash + stem, part.lower()
        if key != last or part in parts:
            if parts:
                yield last, parts
            last, parts = key, {}
        if part:
            parts[part] = content
    if parts:
        yield last, parts


def _rows(shard: str, key: str, parts: dict[str, bytes]) -> Iterator[Row]:
    """A row for each picture of a sample that has a caption: KEY.jpg, or KEY.v2.png with KEY.v2.txt."""
    pictures = [part for part in parts if f".{part.rpartition('.')[2]}" in PICTURES]
    chosen = _chosen(pictures, parts)
    if not chosen:
        yield Broken(printable(f"{shard}:{key}"), f"it holds no picture ({', '.join(PICTURES)})")
    for part in chosen:
        name = f"{key}.{part}".rpartition(".")[0]
        yield row_of(f"{shard}:{name}", _sample, name, part, parts)


def _chosen(pictures: list[str], parts: dict[str, bytes]) -> list[str]:
    """The plain picture, or else the only one; and those with a caption of their own. Others are masks, depths."""
    plain = sorted(part for part in pictures if "." not in part)[:1]
    own = [
        part for part in pictures if "." in part and _caption_of(part.rpartition(".")[0], parts) is not None
    ]
    return [*(plain or (pictures if len(pictures) == 1 and not own else [])), *own]


def _sample(name: str, part: str, parts: dict[str, bytes], where: str) -> Record:
    stem = part.rpartition(".")[0]
    found = _caption_of(stem, parts)
    if found is None:
        found = _caption_of("", parts)
    if found is None:
        raise Trouble(f"its caption {name}.txt is missing")
    if found.endswith("json"):
        described = json_of(parts[found])
        caption = described.get("caption") if isinstance(described, dict) else described
    else:
        caption = text_of(parts[found], "surrogateescape")
    picture = Picture(printable(f"{name}.{part.rpartition('.')[2]}"), content=parts[part])
    return Record(printable(name), (Scene(words_of(caption, "caption"), picture),), where)


def _caption_of(stem: str, parts: dict[str, bytes]) -> str | None:
    """The part that holds the caption of what is called so behind the key."""
    named = (f"{stem}{suffix}".lstrip(".") for suffix in (*CAPTIONS, ".json"))
    return next((part for part in named if part in parts), None)
