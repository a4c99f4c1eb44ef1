"""Model folders from elsewhere bring no code: nothing that they say is run, fetched, or looked for outside of them.

transformers' `auto_map` names Python code of the folder's own, or of another model on the Hub. Where transformers has a
class itself, that is taken and `auto_map` passed over; where it has none, the folder is refused. It never asks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .errors import BadInputError
from .sizes import check_counts
from .texts import read_json

SAYS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
KERNELS = ("attn_implementation", "experts_implementation")
ADAPTER = "adapter_config.json"


def code_refusal(folder: Path) -> BadInputError:
    """The error for a model folder that cannot be read without code of its own."""
    saying = [name for name in SAYS if "auto_map" in _values(folder / name)]
    where = f" (auto_map in {' and '.join(saying)})" if saying else ""
    return BadInputError(
        f"{folder} needs Python code of its own{where}, and no code out of a model folder is ever run. Give a model "
        "of a kind that transformers reads by itself, or the same one in transformers' own layout."
    )


def wants_code(error: Exception) -> bool:
    """Whether transformers or diffusers refused to run a folder's code."""
    return "trust_remote_code" in str(error)


def has_code(config: dict[str, Any]) -> bool:
    """Whether a configuration names code of its folder's own."""
    return bool(config.get("auto_map"))


def forget_code(config: PretrainedConfig) -> PretrainedConfig:
    """`config` without `auto_map`, also in its parts: models that build others of them ask on their own."""
    parts = [config]
    while parts:
        part = parts.pop()
        part.__dict__.pop("auto_map", None)
        parts += [value for value in vars(part).values() if isinstance(value, PretrainedConfig)]
    return config


def check_folder(folder: Path) -> None:
    """BadInputError where a transformers folder names what would be fetched, files that lie outside of it, or more
    layers than any model has."""
    check_alone(folder)
    config = _values(folder / "config.json")
    check_counts(config, str(folder / "config.json"))
    for name in _kernels(config):
        raise BadInputError(
            f"{folder / 'config.json'} asks for the kernel {name!r}, which would be fetched and run. Take its line out "
            f"({' or '.join(KERNELS)}): the model computes the same without."
        )
    check_shards(folder)


def check_alone(folder: Path) -> None:
    """BadInputError where an adapter lies beside a model: transformers would go to the base that it names."""
    if (folder / ADAPTER).is_file():
        raise BadInputError(
            f"{folder} holds an adapter too ({ADAPTER}), which names another base model. Move the adapter's files into "
            "a folder of their own, and load it as an adapter."
        )


def check_shards(folder: Path) -> None:
    """BadInputError where an index of weights names anything but files of its own kind beside it."""
    for index in sorted(folder.glob("*.index*.json")):
        shards, kind = _values(index).get("weight_map"), index.name.split(".index")[0].rpartition(".")[2]
        for name in shards.values() if isinstance(shards, dict) else ():
            if not isinstance(name, str) or not name.endswith(f".{kind}") or set(name) & set("/\\:\0"):
                raise BadInputError(
                    f"{index} names {name!r:.80}; expected .{kind} files beside it. Copy the model again."
                )


def _values(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it cannot be read, which the library that wants it says itself."""
    try:
        values = read_json(file)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _kernels(value: Any, asked: bool = False) -> Iterator[str]:
    """Names such as owner/kernel that a configuration or a part of it gives for its attention or experts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _kernels(inner, asked or key.removeprefix("_").removesuffix("_internal") in KERNELS)
    elif isinstance(value, list):
        for inner in value:
            yield from _kernels(inner, asked)
    elif asked and isinstance(value, str) and "/" in value:
        yield value
