"""What the installed version of transformers can do. The only place that asks for its version."""

from importlib.metadata import version

from packaging.version import Version

INSTALLED = version("transformers")
UPDATE = "Update it: pip install -U transformers"


def has_transformers(oldest: str) -> bool:
    """Whether the installed transformers is of this version or later."""
    return Version(INSTALLED) >= Version(oldest)
