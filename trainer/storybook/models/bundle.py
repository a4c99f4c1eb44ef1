"""Lays what was trained into the `storybook/` folder that the main job loads, in half precision."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from minigpt5_core.conditioning.mapper_file import load_mapper, save_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minigpt5_core.model_index import check_index
from minigpt5_core.vision import load_image_adapter, save_image_adapter
from minigpt5_core.vision.image_adapter import IMAGE_ADAPTER

from ..world.sample import write_world
from .autoencoder import LOCAL_SAFETENSORS

LARGEST_FILE = 16 * 2**20


@dataclass(frozen=True)
class BundleRecipe:
    """Where the parts are: a diffusers folder, runs' folders, a scorer; an empty one is left as it was.

    Only the benchmark uses `scorer`, `reference` (a run of the mapper alone) and `captions` (the caption baseline).
    """

    diffusion: str = ""
    finetune: str = ""
    image_adapter: str = ""
    scorer: str = ""
    reference: str = ""
    captions: str = ""


def write_bundle(recipe: BundleRecipe, out: Path) -> None:
    """Writes the parts the recipe names below `out`. Raises BadInputError for a file over 16 MB."""
    for source in asdict(recipe).values():
        if source and not Path(source).exists():
            raise BadInputError(f"There is nothing at {source}. Name what training wrote, or leave it out.")
    for folder in ("voken_mappers", "benchmark"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if recipe.diffusion:
        check_index(Path(recipe.diffusion))
        pipeline = StableDiffusionPipeline.from_pretrained(
            recipe.diffusion, torch_dtype=torch.float16, **LOCAL_SAFETENSORS
        )
        pipeline.save_pretrained(out / "diffusers")
        _suit_transformers_4(out / "diffusers")
    if recipe.finetune:
        _write_finetuned(Path(recipe.finetune), out)
    if recipe.image_adapter:
        encoder, header = load_image_adapter(Path(recipe.image_adapter) / IMAGE_ADAPTER)
        save_image_adapter(out / "LLM" / IMAGE_ADAPTER, encoder.half(), header)
    if recipe.reference:
        mapper, mapper_header = load_mapper(Path(recipe.reference) / "mapper.safetensors")
        save_mapper(out / "benchmark" / "reference_mapper.safetensors", mapper.half(), mapper_header)
    if recipe.captions:
        _write_adapter(Path(recipe.captions) / "adapter", out / "benchmark" / "caption_adapter")
    if recipe.scorer:
        shutil.copyfile(recipe.scorer, out / "benchmark" / "scorer.safetensors")
    _forget_paths(out / "diffusers")
    write_world(out / "world.json")
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise BadInputError(
                f"{path} holds {path.stat().st_size / 2**20:.1f} MB; a file may hold at most 16."
            )


def _write_finetuned(run: Path, out: Path) -> None:
    mapper, header = load_mapper(run / "mapper.safetensors")
    save_mapper(out / "voken_mappers" / "storybook.safetensors", mapper.half(), header)
    _write_adapter(run / "adapter", out / "loras" / "storybook")


def _write_adapter(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / ADAPTER_CONFIG, target / ADAPTER_CONFIG)
    weights = load_file(source / ADAPTER_WEIGHTS)
    save_file({name: weight.half() for name, weight in weights.items()}, target / ADAPTER_WEIGHTS)


def _suit_transformers_4(folder: Path) -> None:
    """Puts the text encoder and its tokenizer as transformers 4 knows them, which 5 reads too.

    The one's tensors begin with text_model; the other's vocabulary and merges are files of their own.
    """
    CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True).backend_tokenizer.model.save(
        str(folder / "tokenizer")
    )
    file = folder / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": part for name, part in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _forget_paths(folder: Path) -> None:
    """Takes out where diffusers read each part from: it says whose machine, and nothing else."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
