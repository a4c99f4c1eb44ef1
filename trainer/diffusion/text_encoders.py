"""The text encoders and tokenizers of a diffusion model alone: neither its denoiser nor its VAE is read.

They are all that caption alignment asks of the model. From a diffusers folder, also one that holds nothing else, with
or without a model_index.json; or from a checkpoint file (checkpoint_file.py).
"""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from minigpt5_core.conditioning.diffusion_families import DIFFUSION_FAMILIES, DiffusionFamily
from minigpt5_core.diffusion import DIFFUSION_PRECISIONS, find_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.model_index import INDEX, check_index, check_parts
from minigpt5_core.reading import reading
from minigpt5_core.texts import read_json
from minigpt5_core.whole_models import load_whole

from .base import Unloaded
from .checkpoint_file import read_checkpoint

PART = re.compile(r"(text_encoder|tokenizer)(_[23])?")
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
# What the text encoders of a folder without an index tell: the first, the second, the third one's class.
PIPELINES = {
    ("CLIPTextModel",): "StableDiffusionPipeline",
    ("CLIPTextModel", "CLIPTextModelWithProjection"): "StableDiffusionXLPipeline",
    ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection"): "StableDiffusion3Pipeline",
    (
        "CLIPTextModelWithProjection",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
    ): "StableDiffusion3Pipeline",
    ("CLIPTextModel", "T5EncoderModel"): "FluxPipeline",
}
Parts = dict[str, Any]


def lacks_a_denoiser(given: Path) -> bool:
    """Whether what is there has text encoders to give and no pictures: a checkpoint file, or a folder of a part."""
    if given.is_file():
        return True
    has_text = any(PART.fullmatch(one.name) for one in given.glob("text_encoder*"))
    draws = (given / "vae").is_dir() and any((given / one).is_dir() for one in ("unet", "transformer"))
    return has_text and not draws


def text_pipeline(
    given: Path, precision: str, tokenizer: str = ""
) -> tuple[DiffusionFamily, DiffusionPipeline]:
    """The family of a folder or a checkpoint file, and its pipeline of text encoders and tokenizers alone.

    `tokenizer` is the folder of a checkpoint file's CLIP tokenizer (empty: looked for). BadInputError when there is
    nothing to read, or it is of a kind that no mapper is trained for.
    """
    dtype = DIFFUSION_PRECISIONS[precision]
    if given.is_file():
        name, parts = read_checkpoint(given, dtype, tokenizer)
    else:
        name, parts = _read_folder(given, dtype)
    family = _family(given, name)
    return family, _pipeline(family, parts, given)


def _read_folder(given: Path, dtype: torch.dtype) -> tuple[str, Parts]:
    """The pipeline's class by name, and its parts that read text."""
    bare = given.is_dir() and not (given / INDEX).is_file()
    folder = given if bare else find_diffusion(given)
    if bare:
        index = _index_of(folder)
        check_parts(folder, index)
    else:
        check_index(folder)
        index = read_json(folder / INDEX)
    named = {name: kind for name, kind in index.items() if PART.fullmatch(name) and (folder / name).is_dir()}
    parts = {
        name: _read_part(folder / name, kind[0], kind[1], dtype) for name, kind in named.items() if kind[0]
    }
    wanted = [name.replace("text_encoder", "tokenizer") for name in parts if name.startswith("text_encoder")]
    if lacking := [name for name in wanted if name not in parts]:
        raise BadInputError(
            f"{folder} lacks {' and '.join(lacking)}, as diffusers saves them. Copy the folder whole."
        )
    return index["_class_name"], parts


def _index_of(folder: Path) -> dict[str, Any]:
    """What a model_index.json would say of a folder without one, found by the names of its folders."""
    parts = {one.name: one for one in sorted(folder.iterdir()) if one.is_dir() and PART.fullmatch(one.name)}
    encoders = {name: _encoder(one) for name, one in parts.items() if name.startswith("text_encoder")}
    if (name := PIPELINES.get(tuple(encoders.values()))) is None:
        found = ", ".join(f"{part} ({kind})" for part, kind in encoders.items()) or "no text_encoder folder"
        raise BadInputError(
            f"{folder} has no {INDEX}, and by its folders it is of no known family: {found}. Expected text_encoder, "
            "text_encoder_2 ... and tokenizer, tokenizer_2 ... as diffusers saves them for SD 1.5, SD 2.x, SDXL, SD3 "
            f"or Flux. Copy the model's {INDEX} into it."
        )
    kinds = {part: encoders.get(part) or _tokenizer(encoders, part) for part in parts}
    return {"_class_name": name} | {part: ["transformers", kind] for part, kind in kinds.items()}


def _encoder(folder: Path) -> str:
    """The class that a text encoder's config.json names."""
    try:
        named = read_json(folder / "config.json")["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInputError(
            f"{folder / 'config.json'} does not say which text encoder it is of. Copy it again."
        ) from error
    return str(named)


def _tokenizer(encoders: dict[str, str], name: str) -> str:
    """The class of the tokenizer of that name, by the text encoder that reads its ids."""
    reader = encoders.get(name.replace("tokenizer", "text_encoder"), "")
    return "T5TokenizerFast" if reader.startswith("T5") else "CLIPTokenizer"


def _read_part(folder: Path, library: str, kind: str, dtype: torch.dtype) -> Any:
    """A text encoder or a tokenizer, of one of the classes that are known."""
    is_encoder = folder.name.startswith("text_encoder")
    known = ENCODERS if is_encoder else TOKENIZERS
    if library != "transformers" or kind not in known:
        raise BadInputError(
            f"{folder} is a {library} {kind}; mappers are trained for {', '.join(known)} of transformers."
        )
    cure = "Pickled weights (.bin) are never read; save the model as safetensors."
    part = getattr(transformers, kind)
    with reading(f"{folder} cannot be read", folder, cure):
        if not is_encoder:
            return part.from_pretrained(folder, local_files_only=True)
        return load_whole(part, folder, dtype=dtype, local_files_only=True, use_safetensors=True)


def _family(given: Path, name: str) -> DiffusionFamily:
    known = {one.diffusers.pipeline: one for one in reversed(DIFFUSION_FAMILIES.values())}
    if name not in known:
        raise BadInputError(
            f"{given} holds a {name}; mappers are trained for {', '.join(reversed(known))}. Set diffusion to one "
            "of these."
        )
    return known[name]


def _pipeline(family: DiffusionFamily, parts: Parts, given: Path) -> DiffusionPipeline:
    """The family's pipeline, of which nothing but `parts` is there."""
    kind = getattr(diffusers, family.diffusers.pipeline)
    known = inspect.signature(kind.__init__).parameters
    wanted = [name for name, one in known.items() if one.default is one.empty and name != "self"]
    quiet = {"requires_safety_checker": False, "add_watermarker": False}
    pipeline = kind(
        **{name: parts.get(name) for name in wanted},
        **{name: value for name, value in quiet.items() if name in known},
    )
    if "transformer" in known:  # SD3 without T5 puts zeros of its transformer's width in T5's place
        pipeline.transformer = _described(given / "transformer" / "config.json", family)
    return pipeline


def _described(file: Path, family: DiffusionFamily) -> Unloaded:
    """What a transformer that is not loaded says of its width: its configuration, or else the family's."""
    width = family.space.width
    try:
        width = int(read_json(file)[family.diffusers.width])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return Unloaded(SimpleNamespace(**{family.diffusers.width: width}))
