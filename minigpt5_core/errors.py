"""Errors a user can mend; command lines print their message and exit with code 2."""


class BadInputError(ValueError):
    """What was found, what was expected, and how to mend it."""


class CancelledError(Exception):
    """A callback asked to stop."""
