"""What comes over a link into a dropdown: ComfyUI compares only what is chosen in the node with what it offers."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(widget: str, value: object, options: Sequence[str]) -> None:
    """ValueError, naming both sides, unless the value is one of the widget's options."""
    if value not in options:
        raise ValueError(
            f"{widget} is {value!r:.200}; expected one of {', '.join(options)}. Choose one in the node, or give one of "
            "these names over the link."
        )
