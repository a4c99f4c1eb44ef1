"""transformers' models with all of their weights: for one that is missing the library would draw random numbers."""

from pathlib import Path
from typing import Any

from .errors import BadInputError
from .tensor_files import check_finite


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)`; BadInputError where weights are missing, or are no numbers."""
    model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise BadInputError(
            f"{folder} lacks {len(missing)} of the weights of a {type(model).__name__}, such as {missing[0]}: without "
            "them it would compute nonsense. Copy the folder whole."
        )
    check_finite(model, f"{folder} is damaged")
    return model
