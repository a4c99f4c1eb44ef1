"""Moved to `llm.families.pictures`."""

from ..llm.families.pictures import *
