"""Moved to `story.prompts`."""

from .story.prompts import *
