"""Moved to `story.published_prompts`."""

from .story.published_prompts import *
