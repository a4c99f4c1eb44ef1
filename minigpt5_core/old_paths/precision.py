"""Moved to `llm.precision`."""

from .llm.precision import *
