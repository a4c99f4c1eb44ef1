"""A chat template run for so long at most: it is somebody else's program, and three loops in each other have no end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TEMPLATE = "<template>"  # what jinja calls the file of a template's code
SECONDS = 10.0  # many thousand times as long as a template takes


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TimeoutError inside of a template that still runs after so many seconds. What a template does in one step,
    such as a string of ten million million letters, is not ended by it."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def line(frame: FrameType, event: str, given: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it does not end within {seconds:g} seconds")
        return line

    def call(frame: FrameType, event: str, given: Any) -> Any:
        return line if frame.f_code.co_filename == TEMPLATE else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
