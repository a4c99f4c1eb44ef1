"""Errors that a user can correct; command lines print their message and exit with code 2."""


class BadInputError(ValueError):
    """Its message says what was found, what was expected, and how to correct it."""


class CancelledError(Exception):
    """A callback asked to stop."""
