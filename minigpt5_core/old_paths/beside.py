"""Moved to `llm.unmerged_lora`."""

from .llm.unmerged_lora import *
