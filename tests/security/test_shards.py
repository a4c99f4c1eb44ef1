"""A webdataset shard is a local file, whatever it is called, and nothing in it reaches the disk."""

import io
import os
import tarfile
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from trainer.cli import main
from trainer.data.formats import read
from trainer.data.records import Broken, Record
from trainer.data.stream import Stream

PNG = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(PNG, "PNG")
NAMES = (
    "pipe:touch PWNED;#.tar", "a#b.tar", "a?b.tar", "{1..2}.tar", "{.tar", "c:x.tar", "file:x.tar", "http:x.tar",
    "a b%20c.tar", "a::b.tar", "zip:x.tar", "*.tar",
)  # fmt: skip


def add(file, name, content=b"", **settings):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in settings.items():
        setattr(member, key, value)
    file.addfile(member, io.BytesIO(content))


def shard(path, caption="a dog"):
    with tarfile.open(path, "w") as file:
        add(file, "k.png", PNG.getvalue())
        add(file, "k.txt", caption.encode())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_shard_is_opened_as_a_file_whatever_it_is_called(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    shard(name, f"the caption of {name}")
    for path in (Path(name), Path(".")) if relative else (tmp_path / name, tmp_path):
        (record,) = read(path, "webdataset")
        assert (record.scenes[0].text, record.where) == (f"the caption of {name}", f"{name}:k")
        assert record.pictures[0].open().size == (4, 4)
        assert main(["data", "check", str(path), "--format", "webdataset"]) == 0
    assert os.listdir() == [name]


@pytest.mark.trains
@pytest.mark.parametrize("folder", ["pipe:touch PWNED;#", "a::b", "zip:x", "{1..2}"])
def test_a_stream_opens_what_lies_in_the_folder_too(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    shard(Path(folder) / "pipe:touch PWNED;#.tar")
    assert [record.id for record in islice(Stream(Path(folder), "webdataset"), 2)] == ["k", "k"]
    assert os.listdir() == [folder]


def test_members_that_lead_out_are_no_danger(tmp_path):
    """Links and devices are passed by; a name that leads out is a key like any other."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as file:
        for name in ("../../out", "/etc/out", "k"):
            add(file, f"{name}.png", PNG.getvalue())
            add(file, f"{name}.txt", b"a dog")
        add(file, "link.png", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.txt"))
        add(file, "link.txt", type=tarfile.LNKTYPE, linkname="../secret.txt")
        add(file, "null.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(file, "pipe.txt", type=tarfile.FIFOTYPE)
    rows = list(read(tmp_path / "in", "webdataset"))
    assert [row.id for row in rows] == ["../../out", "/etc/out", "k"]
    assert all(isinstance(row, Record) and row.scenes[0].text == "a dog" for row in rows)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "secret.txt", "x.tar"]


def test_what_is_no_file_and_what_is_empty_are_rows_of_their_own(tmp_path):
    """Neither stops the shards behind it: a folder named so, a pipe that nobody writes to, an empty shard."""
    (tmp_path / "a.tar").mkdir()
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").touch()
    with tarfile.open(tmp_path / "d.tar", "w"):
        pass
    shard(tmp_path / "e.tar")
    *broken, last = read(tmp_path, "webdataset")
    assert isinstance(last, Record) and all(isinstance(row, Broken) for row in broken)
    assert [(row.where, row.why) for row in broken[:2]] == [
        (name, "the shard cannot be read: it is no file") for name in ("a.tar", "b.tar")
    ]
    assert [row.where for row in broken[2:]] == ["c.tar"] and "breaks off" in broken[2].why
