"""Turns what libraries raise for files they cannot use into an error that says which file, why, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import BadInputError, CancelledError
from .own_code import code_refusal, wants_code

# What libraries raise for a folder that is broken or foreign, which is anything: safetensors, jinja and the checks of a
# configuration's types have errors of their own; ImportError says which package a tokenizer or a model class needs; a
# GGUF file that is cut short ends in the midst of a number or a list.
UNREADABLE = (Exception,)


@contextmanager
def reading(trouble: str, folder: Path, cure: str = "") -> Iterator[None]:
    """Turns what the libraries raise for files they cannot use into BadInputError: `trouble`, why, and `cure`.

    If `folder` is a GGUF file that is not whole, or holds a safetensors file that is not, that is the reason given,
    whatever was raised.
    """
    try:
        yield
    except (BadInputError, CancelledError):
        raise
    except UNREADABLE as error:
        if wants_code(error):
            raise code_refusal(folder) from error
        if broken := _cut_short(folder):
            raise BadInputError(
                f"{broken} is not a whole {broken.suffix[1:]} file. It may be cut short: copy it again."
            ) from error
        raise BadInputError(f"{trouble}: {_first_line(error)} {cure}".rstrip()) from error


def _cut_short(folder: Path) -> Path | None:
    if folder.suffix == ".gguf" and folder.is_file():
        return None if is_whole(folder) else folder
    for file in sorted(folder.rglob("[!.]*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
        except OSError:  # missing or locked, which the error at hand says
            continue
    return None


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):  # its text is the bare key
        return f"{error} is missing."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def is_whole(file: Path) -> bool:
    """Whether the GGUF file holds all that its header promises (seconds: the vocabulary is read word by word)."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except (ValueError, IndexError, OverflowError, MemoryError):
        return False
    return True
