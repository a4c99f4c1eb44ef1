"""Moved to `llm.files`."""

from .llm.files import *
