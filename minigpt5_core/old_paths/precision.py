"""Moved to `llm.precision`."""

from .llm.precision import *
from .llm.precision import dtype_and_quantization as holding  # its old name
