"""The part of `comfy_api.latest` that our nodes use, as in ComfyUI 0.3.64."""

from . import io as io


class ComfyExtension:
    """A pack's own class derives from it."""
