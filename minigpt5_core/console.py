"""How a command line begins and ends, whatever it does in between: terminals of any encoding, Ctrl-C, closed pipes."""

import os
import sys
from collections.abc import Callable
from typing import TextIO

INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells count a process that SIGINT, or SIGPIPE, has ended


def run(load: Callable[[], Callable[[], int]]) -> int:
    """The exit code of what `load` imports and returns.

    Ctrl-C counts from the first import on, which may take seconds. Whoever reads the output may stop reading
    (`| head -1`), and a character that the terminal has no code for does not end the work.
    """
    for stream in (sys.stdout, sys.stderr):
        _accept_any_character(stream)
    try:
        code = load()()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        _close(sys.stdout)
        return PIPE_CLOSED


def _accept_any_character(stream: TextIO) -> None:
    reconfigure = getattr(stream, "reconfigure", None)  # not there where a test or an editor has put its own
    if reconfigure and stream.errors == "strict":
        reconfigure(errors="backslashreplace")


def _close(stream: TextIO) -> None:
    """Python flushes at its end, into a pipe that nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
