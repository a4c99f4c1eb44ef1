"""Other people's weights, read without running anything: pickled checkpoints and model folders.

Where the file's layout allows it the tensors stay on the disk until they are used.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigpt5_core.errors import BadInputError

ZIP = b"PK\x03\x04"
# what torch says of a pickle that asks for more than tensors
FORBIDDEN = re.compile(r"GLOBAL (\S+)|(unsupported class|unrecognized function|eval or function) ?(\S*)")


def read_pickle(path: Path) -> dict[str, Any]:
    """What torch.save wrote, with weights_only=True.

    Raises BadInputError for a file that would run code, one that is cut short and one that is something else.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise BadInputError(_refusal(path, str(error))) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise BadInputError(
            f"{path} is not a whole PyTorch file ({_first_line(error)}). It may be cut short: download it again."
        ) from error
    if not isinstance(checkpoint, dict):
        raise BadInputError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of tensors.")
    return checkpoint


def read_tensors(path: Path, *keys: str) -> dict[str, Tensor]:
    """The tensors of a pickled file by name: under the first of `keys` that it has, else the file itself."""
    checkpoint = read_pickle(path)
    inside = next((checkpoint[key] for key in keys if key in checkpoint), checkpoint)
    if not isinstance(inside, dict) or not inside or not all(torch.is_tensor(v) for v in inside.values()):
        raise BadInputError(
            f"{path} holds no tensors by name{' under ' + ' or '.join(keys) if keys else ''}; it has "
            f"{', '.join(sorted(map(str, checkpoint))[:5])}. Give a file of weights."
        )
    return inside


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face model folder: its safetensors files, or the pickled ones where it has none."""
    tensors: dict[str, Tensor] = {}
    if files := sorted(folder.glob("[!.]*.safetensors")):
        for file in files:
            try:
                tensors |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise BadInputError(
                    f"{file} is not a whole safetensors file ({error}). It may be cut short: download it again."
                ) from error
        return tensors
    for file in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= read_tensors(file)
    if not tensors:
        raise BadInputError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin). Give a Hugging Face model folder."
        )
    return tensors


def _refusal(path: Path, message: str) -> str:
    if found := FORBIDDEN.search(message):
        name = found[1] or found[3] or "an object of its own"
        return (
            f"{path} is not loaded: to be read it would run code ({name}), which a file of weights never needs. It may "
            "be hostile: delete it, and download the weights from their authors."
        )
    return f"{path} is no PyTorch file of weights, or is cut short. Download it again."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
