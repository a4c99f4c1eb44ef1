"""Moved to `llm.families.pictures`."""

from ..llm.families.pictures import *
from ..vision.pictures import middle_square
