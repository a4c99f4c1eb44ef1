"""Moved to `llm.gguf_files`."""

from .llm.gguf_files import *
from .reading import is_whole
