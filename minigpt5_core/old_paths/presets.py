"""Moved to `story.presets`."""

from .story.presets import *
