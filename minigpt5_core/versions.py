"""What the installed version of transformers can do. The only place that asks for its version."""

from importlib.metadata import version

from packaging.version import Version

from .errors import BadInputError

INSTALLED = version("transformers")


def has_transformers(oldest: str) -> bool:
    """Whether the installed transformers is of this version or later."""
    return Version(INSTALLED) >= Version(oldest)


def check_transformers(what: str, oldest: str) -> None:
    """BadInputError, which begins with `what`, unless the installed transformers is of this version or later."""
    if not has_transformers(oldest):
        raise BadInputError(
            f"{what}, which needs transformers {oldest} or later, but {INSTALLED} is installed. Update it: "
            "pip install -U transformers"
        )


# What from_pretrained calls the type of the weights.
DTYPE = "dtype" if has_transformers("4.56") else "torch_dtype"
