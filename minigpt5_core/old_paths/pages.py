"""Moved to `story.pages`."""

from .story.pages import *
