"""Schemas for every ComfyUI from 0.3.64 on: arguments that the running version does not know are left out.

An unknown argument would take the whole pack down at start-up. The only place that looks at what ComfyUI offers.
"""

import dataclasses
from typing import Any

from comfy_api.latest import io

KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**arguments: Any) -> io.Schema:
    """An io.Schema of the arguments that the running ComfyUI knows."""
    return io.Schema(**{name: value for name, value in arguments.items() if name in KNOWN})


def link(kind: Any, id: str, **arguments: Any) -> Any:
    """An input that arrives as a link, for a node that expands: `raw_link` in newer versions, a key in all."""
    return kind.Input(id, extra_dict={"rawLink": True}, **arguments)
