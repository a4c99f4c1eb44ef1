"""Moved to `llm.gguf_files`."""

from .llm.gguf_files import *
