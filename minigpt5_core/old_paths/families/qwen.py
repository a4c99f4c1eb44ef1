"""Moved to `llm.families.qwen`."""

from ..llm.families.qwen import *
