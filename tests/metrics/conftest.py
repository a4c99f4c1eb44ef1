"""Folders of real classes at toy size."""

import importlib
import importlib.util
import string
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
)

from tests.metrics.toys import SIDE, save_processor


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    letters = [*string.printable.strip()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "eos_token_id": len(tokens) - 1, "max_position_embeddings": 20}
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": SIDE, "patch_size": 14},
        projection_dim=8,
        initializer_factor=20.0,  # features that differ from picture to picture
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dino"
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14,
        initializer_range=0.5,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def wordnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet with one set of synonyms, car and auto, in Princeton's format (wndb(5WN)), without lexnames."""
    folder = tmp_path_factory.mktemp("wordnet")
    for kind in ("adj", "adv", "noun", "verb"):
        for name in (f"data.{kind}", f"index.{kind}", f"{kind}.exc"):
            (folder / name).write_text("")
    (folder / "cntlist.rev").write_text("")
    (folder / "data.noun").write_text("00000000 06 n 02 car 0 auto 0 000 | a motor vehicle  \n")
    (folder / "index.noun").write_text(
        "auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n"
    )  # in alphabetical order, as the reader searches by halves
    return folder


@pytest.fixture(scope="module")
def fidelity() -> None:
    """torch-fidelity imports torchvision, which its Inception does not use: stand-ins while it is imported."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        absent = importlib.util.find_spec("torchvision") is None
        for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models") if absent else ():
            module = ModuleType(f"torchvision{name}")
            vars(module).update(dict.fromkeys(("CIFAR10", "STL10", "CIFAR100"), object))
            vars(module).update(dict.fromkeys(("datasets", "transforms", "functional", "models"), module))
            patch.setitem(sys.modules, module.__name__, module)
        importlib.import_module("torch_fidelity")
