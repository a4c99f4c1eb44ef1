"""Moved to `llm.families.base`."""

from ..llm.families.base import *
from ..llm.families.base import VisionFamily as SeeingFamily  # its old name
