"""Moved to `vision.qformer`."""

from .vision.pictures import white_square
from .vision.qformer import *
from .vision.qformer import STD as DEVIATION  # its old name
