"""What a diffusers folder may be made of: its model_index.json names classes, and diffusers imports what it names.

diffusers refuses code from elsewhere too, but only in later versions and not all of it: what is allowed is said here.
"""

from pathlib import Path
from typing import Any

from diffusers import pipelines

from .errors import BadInputError
from .own_code import check_folder
from .texts import read_json

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
# Pipelines of diffusers that keep classes for themselves, such as Stable Diffusion's safety checker.
PIPELINES = (
    "stable_diffusion", "stable_diffusion_safe", "deepfloyd_if", "kandinsky", "latent_diffusion", "paint_by_example",
    "stable_cascade", "unclip", "unidiffuser", "wuerstchen",
)  # fmt: skip
# Files that diffusers would run: what it looks for by these names, whatever the index says.
MODULES = ("None.py", "pipeline.py")


def check_index(folder: Path) -> None:
    """BadInputError unless the folder's parts are classes of diffusers and transformers, and files in the folder."""
    check_parts(folder, _read(folder / INDEX))


def check_parts(folder: Path, index: dict[str, Any]) -> None:
    """As `check_index`, of what an index says or would say of the folder."""
    _check_pipeline(folder, index.get("_class_name"))
    for module in MODULES:
        _check_absent(folder, folder / module)
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_"):
            _check_part(folder, name, value)


def _read(file: Path) -> dict[str, Any]:
    try:
        index = read_json(file)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file} cannot be read ({error}). Copy the model again.") from error
    if not isinstance(index, dict):
        raise BadInputError(f"{file} is {index!r:.60}, expected an object. Copy the model again.")
    return index


def _check_pipeline(folder: Path, name: Any) -> None:
    known = isinstance(name, str) and name.isidentifier() and "Pipeline" in name and "Auto" not in name
    if not known or "Modular" in name:
        raise _refusal(folder, "_class_name", name, "the name of one of diffusers' own pipelines")


def _check_part(folder: Path, name: str, value: list) -> None:
    if value == [None, None] or value == [None]:
        return
    if not name.isidentifier():
        raise _refusal(folder, name, value, "a part's name to be a plain word")
    if len(value) != 2 or not all(isinstance(one, str) and one.isidentifier() for one in value):
        raise _refusal(folder, name, value, "a library and a class")
    library, kind = value
    if library not in LIBRARIES and not (library in PIPELINES and hasattr(pipelines, library)):
        raise _refusal(folder, name, value, f"a class of {' or '.join(LIBRARIES)}")
    # such a class finds out what to load from the part's own files, which nobody has looked at
    if kind.startswith("Auto") and not kind.startswith("Autoencoder") or "Pipeline" in kind:
        raise _refusal(folder, name, value, "a class that says itself what it is")
    for module in sorted((folder / name).glob("*.py")):
        _check_absent(folder, module)
    check_folder(folder / name)


def _check_absent(folder: Path, module: Path) -> None:
    if module.exists():
        raise BadInputError(
            f"{folder} brings Python code of its own ({module.relative_to(folder)}), and no code out of a model folder "
            "is ever run. Give a model made of diffusers' own classes, or take the file out."
        )


def _refusal(folder: Path, name: str, found: Any, expected: str) -> BadInputError:
    return BadInputError(
        f"{folder / INDEX}: {name} is {found!r:.120}; expected {expected}, since no other code is run. Give a model "
        "made of diffusers' and transformers' own classes."
    )
