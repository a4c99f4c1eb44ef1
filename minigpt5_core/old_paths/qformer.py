"""Moved to `vision.qformer`."""

from .vision.qformer import *
