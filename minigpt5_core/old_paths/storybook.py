"""Moved to `story.storybook`."""

from .story.storybook import *
