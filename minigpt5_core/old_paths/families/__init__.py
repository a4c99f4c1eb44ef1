"""Moved to `llm.families`."""

from ..llm.families import *
