"""Moved to `llm.families.square`."""

from ..llm.families.square import *
