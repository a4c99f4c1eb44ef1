"""A command at a terminal or in a pipe: letters that cannot be shown, a reader that has gone, Ctrl-C at any time."""

import os
import sys
from collections.abc import Callable

INTERRUPTED, CLOSED = 130, 141  # what shells have for SIGINT and SIGPIPE


def run(find_main: Callable[[], Callable[[], int]]) -> int:
    """The exit code of the command that `find_main` imports, which takes seconds and may be interrupted too.

    What the output cannot show is written as an escape. If nobody reads it any more (`| head -1`), the command ends.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = find_main()()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes once more when it ends
        return CLOSED
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    return code
