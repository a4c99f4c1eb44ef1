"""Moved to `conditioning.mapper`."""

from .conditioning.mapper import *
