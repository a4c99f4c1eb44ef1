"""Lays what was trained into the `storybook/` folder that the main job loads, in half precision."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.weights import load_mapper, save_mapper

from .sample import write_world

LARGEST_FILE = 16 * 2**20


@dataclass(frozen=True)
class BundleRecipe:
    """Where the parts are: a diffusers folder, a finetune run's folder, a scorer; an empty one is left as it was."""

    diffusion: str = ""
    finetune: str = ""
    scorer: str = ""


def write_bundle(recipe: BundleRecipe, out: Path) -> None:
    """Writes the parts the recipe names below `out`. Raises BadInputError for a file over 16 MB."""
    for source in (recipe.diffusion, recipe.finetune, recipe.scorer):
        if source and not Path(source).exists():
            raise BadInputError(f"There is nothing at {source}. Name what training wrote, or leave it out.")
    (out / "voken_mappers").mkdir(parents=True, exist_ok=True)
    if recipe.diffusion:
        pipeline = StableDiffusionPipeline.from_pretrained(
            recipe.diffusion, torch_dtype=torch.float16, local_files_only=True
        )
        pipeline.save_pretrained(out / "diffusers")
    if recipe.finetune:
        _write_finetuned(Path(recipe.finetune), out)
    if recipe.scorer:
        shutil.copyfile(recipe.scorer, out / "scorer.safetensors")
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
    adapter = out / "loras" / "storybook"
    adapter.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "adapter" / "adapter_config.json", adapter / "adapter_config.json")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: weight.half() for name, weight in weights.items()}, adapter / "adapter_model.safetensors"
    )


def _forget_paths(folder: Path) -> None:
    """Takes out where diffusers read each part from: it says whose machine, and nothing else."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
