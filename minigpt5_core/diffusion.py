"""Diffusion models in diffusers' layout: loading them, and checking that they take a mapper's conditioning."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline

from .conditioning.diffusion_families import SPACES, widths_in_diffusers
from .conditioning.mapper_file import MapperHeader
from .conditioning.spaces import Conditioning, Space, check_space
from .errors import BadInputError
from .model_index import check_index
from .reading import reading
from .tensor_files import check_finite
from .texts import read_json
from .versions import DTYPE
from .whole_models import load_whole

DIFFUSION_PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def load_diffusion(folder: Path, device: str = "cpu", precision: str = "float32") -> DiffusionPipeline:
    """The pipeline in a diffusers folder or of a name on the Hub (`find_diffusion`), in float32 or bf16.

    The precision is the one given, whatever the files hold. Text encoders that are left out of the folder are None: a
    mapper answers in their place. BadInputError when there is no model, or its safetensors files are not whole, or for
    another precision.
    """
    if precision not in DIFFUSION_PRECISIONS:
        raise BadInputError(
            f"diffusion_precision is {precision!r}; it can be {' or '.join(DIFFUSION_PRECISIONS)}."
        )
    folder = find_diffusion(folder)
    cure = "Pickled weights (.bin) are never read; save the pipeline as safetensors, in full precision."
    check_index(folder)
    dtype = DIFFUSION_PRECISIONS[precision]
    with reading(f"The diffusion model in {folder} cannot be read", folder, cure):
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            **_left_out(folder),
            **_text_encoders(folder, dtype),
        ).to(device)  # where weights are missing, they are missed now
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                check_finite(part, f"{folder / name} is damaged")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def find_diffusion(folder: Path) -> Path:
    """`folder`, or if there is no such folder, the one that `hf download` has fetched for a model of that name.

    Nothing is downloaded here. BadInputError when neither is there, or it is no diffusers model.
    """
    found, name = folder, folder.as_posix()
    named = not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", name)
    if named:
        with suppress(OSError, ValueError):  # ValueError: one that asks for code of its own
            found = Path(DiffusionPipeline.download(name, local_files_only=True))
    if (found / "model_index.json").is_file():
        return found
    cure = f", or fetch the model of that name: hf download {name}" if named else ""
    raise BadInputError(
        f"{folder} is no diffusers model folder (it has no model_index.json). Give a folder that a diffusers "
        f"pipeline was saved to{cure}."
    )


def _left_out(folder: Path) -> dict[str, None]:
    """The text encoders and tokenizers that the index names and the folder lacks, such as SD3's T5 of 9 GB."""
    index = read_json(folder / "model_index.json")
    parts = [name for name in index if name.startswith(("text_encoder", "tokenizer"))]
    return {name: None for name in parts if not (folder / name).is_dir()}


def _text_encoders(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Those that are there, each with all of its weights, which diffusers would not make sure of."""
    index = read_json(folder / "model_index.json")
    known = {
        name: kind
        for name, kind in index.items()
        if name.startswith("text_encoder") and kind[0] == "transformers"
    }
    options = {DTYPE: dtype, "local_files_only": True, "use_safetensors": True}
    return {
        name: load_whole(getattr(transformers, kind[1]), folder / name, **options)
        for name, kind in known.items()
        if (folder / name).is_dir()
    }


def check_diffusion(diffusion: DiffusionPipeline, header: MapperHeader, file: Path) -> None:
    """Raises BadInputError, naming both, when the mapper's space is not the one that the diffusion model takes.

    A model whose configuration does not say what it takes passes.
    """
    expected = space_of(diffusion, header.space)
    try:
        check_space(header.space, expected)
    except BadInputError as error:
        raise BadInputError(
            f"{file.name}: {error} Give a mapper with --mapper, a diffusion model with --diffusion."
        ) from error


def space_of(diffusion: DiffusionPipeline, default: Space) -> Space:
    """The space a diffusion model takes, read off its configuration; fields that it omits come from `default`."""
    widths = widths_in_diffusers(diffusion, default)
    return default if widths is None else space_of_widths(widths, default, type(diffusion).__name__)


def space_of_widths(widths: tuple[int, int | None], default: Space, name: str) -> Space:
    """The space of conditioning with widths (C, P): `default` or a known one, else one called `name`."""
    for known in (default, *SPACES.values()):
        if (known.width, known.pooled_width) == widths:
            return known
    return Space(name, default.tokens, *widths)


def prompt_arguments(
    positive: Conditioning, negative: Conditioning, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The arguments by which a diffusers pipeline of that precision takes conditioning in place of a prompt."""
    positive, negative = positive.to(dtype), negative.to(dtype)
    arguments = {"prompt_embeds": positive.tokens, "negative_prompt_embeds": negative.tokens}
    if positive.pooled is not None and negative.pooled is not None:
        arguments |= {
            "pooled_prompt_embeds": positive.pooled,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
    return arguments
