"""Moved to `llm.families.base`."""

from ..llm.families.base import *
