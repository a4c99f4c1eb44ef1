"""Moved to `llm.prefix`."""

from .llm.prefix import *
