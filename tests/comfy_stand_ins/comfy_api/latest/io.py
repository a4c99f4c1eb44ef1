"""Sockets, widgets, schemas and nodes with the arguments of ComfyUI 0.3.64; any other is a TypeError there too.

Our nodes name every argument but the id, so here the others go by name alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any


@dataclass(kw_only=True)
class _Common:
    id: str = field(kw_only=False)
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None


@dataclass(kw_only=True)
class Input(_Common):
    """A socket. Widgets of this version take no `extra_dict`."""

    extra_dict: dict[str, Any] | None = None


@dataclass(kw_only=True)
class WidgetInput(_Common):
    """A socket with a widget."""

    default: Any = None
    socketless: bool | None = None


@dataclass(kw_only=True)
class _Int(WidgetInput):
    min: int | None = None
    max: int | None = None
    step: int | None = None
    control_after_generate: bool | None = None
    display_mode: Any = None
    force_input: bool | None = None


@dataclass(kw_only=True)
class _Float(WidgetInput):
    min: float | None = None
    max: float | None = None
    step: float | None = None
    round: float | None = None
    display_mode: Any = None
    force_input: bool | None = None


@dataclass(kw_only=True)
class _String(WidgetInput):
    multiline: bool = False
    placeholder: str | None = None
    dynamic_prompts: bool | None = None
    force_input: bool | None = None


@dataclass(kw_only=True)
class _Combo(WidgetInput):
    options: list[str] | None = None
    control_after_generate: bool | None = None
    upload: Any = None
    image_folder: Any = None
    remote: Any = None


@dataclass(kw_only=True)
class Output:
    """What a node puts out."""

    id: str | None = field(default=None, kw_only=False)
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False


def _socket(io_type: str, kind: type = Input) -> Any:
    marked = {"io_type": io_type}
    ends = {"Input": type("Input", (kind,), marked), "Output": type("Output", (Output,), marked)}
    return type(io_type, (), marked | ends)


def Custom(io_type: str) -> Any:
    """A socket type of a pack's own."""
    return _socket(io_type)


Int, Float, String, Combo = (
    _socket(name, kind)
    for name, kind in (("INT", _Int), ("FLOAT", _Float), ("STRING", _String), ("COMBO", _Combo))
)
Image, Latent, Conditioning, Model, Clip, Vae = map(
    _socket, ("IMAGE", "LATENT", "CONDITIONING", "MODEL", "CLIP", "VAE")
)


class Hidden(StrEnum):
    """What a node may ask to be told besides its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


@dataclass
class Schema:
    """A node as ComfyUI and the browser know it."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def validate(self) -> None:
        """ComfyUI wants every id once, inputs and outputs together."""
        counts = Counter(end.id for end in (*self.inputs, *self.outputs))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"{self.node_id}: ids must be unique, but {twice} are not.")


class NodeOutput:
    """What `execute` returns."""

    def __init__(
        self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None
    ) -> None:
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution


class ComfyNode:
    """Base of all nodes."""

    hidden: Any = None

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The schema, checked."""
        schema = cls.define_schema()
        schema.validate()
        return schema

    @classmethod
    def PREPARE_CLASS_CLONE(cls, hidden_inputs: dict[Hidden, Any] | None) -> type:
        """ComfyUI runs a copy of the class, which alone holds what is hidden."""
        told = {name.name: (hidden_inputs or {}).get(name) for name in Hidden}
        return type(cls.__name__, (cls,), {"hidden": SimpleNamespace(**told)})

    @classmethod
    def EXECUTE_NORMALIZED(cls, **inputs: Any) -> NodeOutput:
        """`execute`, and what ComfyUI says to a wrong answer."""
        answer = cls.execute(**inputs)
        if not isinstance(answer, NodeOutput):
            raise TypeError(f"{cls.__name__} returned {type(answer)}")
        if answer.expand is not None and not cls.GET_SCHEMA().enable_expand:
            raise ValueError(f"{cls.__name__} is not expandable")
        return answer
