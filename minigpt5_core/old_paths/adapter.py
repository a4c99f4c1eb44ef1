"""Moved to `llm.adapter`."""

from .llm.adapter import *
