"""What ComfyUI's command line has set."""

from types import SimpleNamespace

args = SimpleNamespace(disable_metadata=False)
