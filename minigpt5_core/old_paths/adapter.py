"""Moved to `llm.adapter`."""

from .llm.adapter import *
from .llm.adapter import split_quantized_lora as take_beside  # its old name
