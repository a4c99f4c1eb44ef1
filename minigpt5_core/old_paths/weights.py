"""Moved to `tensor_files`, `conditioning.mapper_file`, `llm.weights` and `vision.image_adapter`."""

from .conditioning.mapper_file import *
from .llm.weights import *
from .tensor_files import *
from .vision.image_adapter import IMAGE_ADAPTER, QFORMER
