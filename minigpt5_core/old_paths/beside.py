"""Moved to `llm.unmerged_lora`."""

from .llm.unmerged_lora import *
from .llm.unmerged_lora import UnmergedLora as Beside  # its old name
from .llm.unmerged_lora import is_quantized as is_packed  # its old name
