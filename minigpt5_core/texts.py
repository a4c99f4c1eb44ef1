"""Text files as people have them: UTF-8 with a byte order mark or without, UTF-16 and UTF-32 with one; JSON in them.

Excel and Windows' Notepad and PowerShell write such marks. Line ends may be any.
"""

import codecs
import json
from pathlib import Path
from typing import Any, TextIO

MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(start: bytes) -> str:
    """How a text that begins with these bytes (4 are enough) is encoded."""
    return next((encoding for mark, encoding in MARKS if start.startswith(mark)), "utf-8-sig")


def text_of(content: bytes, errors: str = "strict") -> str:
    """The text; UnicodeDecodeError for what is none, unless `errors` says otherwise."""
    return content.decode(encoding_of(content[:4]), errors)


def text_in(path: Path) -> str:
    """The whole text of a file, its lines ended by \\n; OSError, or UnicodeDecodeError for what is no text."""
    return text_of(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file to be read line by line. What is no text comes as lone surrogates, by which its line is known."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return path.open(encoding=encoding, errors=errors, newline=newline)


def is_text(text: str) -> bool:
    """Whether every tokenizer and file takes it: no half characters, no zero bytes."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str) -> str:
    """The text with half characters written out, so that it can be printed and kept."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_json(text: str | bytes) -> Any:
    """What JSON says, in any of the encodings; ValueError for anything that is none, nested too deep or too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """What a JSON file says; OSError, or ValueError for one that is none."""
    return parse_json(path.read_bytes())
