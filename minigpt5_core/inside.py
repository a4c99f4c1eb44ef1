"""Names of files in documents: what a document says must not lead out of the folder that it lies in."""

import os
from pathlib import Path, PureWindowsPath

from .errors import BadInputError


def named_file(folder: Path, name: str) -> Path:
    """The path of what `name` says lies in or below `folder`, there or not; no `..` is left in it.

    What Windows has written with backslashes is found on every system. A link inside the folder is the user's own doing
    and is followed. BadInputError for an address, and for a name that leads out of the folder on any system: an
    absolute one, one with a drive, one with too many `..`.
    """
    if "://" in name or name[:5].lower() == "data:":
        raise BadInputError(
            f"{name!r:.80} is an address; expected the name of a file, and nothing is fetched"
        )
    if _leads_out(name):
        raise BadInputError(
            f"{name!r:.200} leads out of its folder; expected a file in or below {folder.name}/"
        )
    path = folder / os.path.normpath(name)
    if "\\" in name and not os.path.lexists(path):  # written on Windows
        return folder / os.path.normpath(name.replace("\\", "/"))
    return path


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether what `path` leads to, through whatever links, is in or below `folder`."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _leads_out(name: str) -> bool:
    plain = os.path.normpath(name.replace("\\", "/"))
    anywhere = PureWindowsPath(name).is_absolute() or name[:1] in ("/", "\\") or "\0" in name
    return anywhere or bool(os.path.splitdrive(name)[0]) or plain == ".." or plain.startswith(f"..{os.sep}")
