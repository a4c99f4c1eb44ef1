"""Stories: as they are kept, worded for the LLM, and written out as pages. Importing this package costs no torch."""

from .story import FILE_NAME, FORMAT_VERSION, Scene, Story, load_story

__all__ = ["FILE_NAME", "FORMAT_VERSION", "Scene", "Story", "load_story"]
