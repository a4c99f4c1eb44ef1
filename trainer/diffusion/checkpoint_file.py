"""The text encoders of a checkpoint file (.safetensors) as ComfyUI users have them: SD 1.5, SD 2.x and SDXL.

They are found by their tensors' names, and nothing else of the file is read. OpenAI's CLIP lies there as transformers
names it, OpenCLIP's as OpenCLIP does: its queries, keys and values are one matrix.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minigpt5_core.errors import BadInputError
from minigpt5_core.own_code import check_folder
from minigpt5_core.reading import reading

Tensors = dict[str, Tensor]
START, END, TOKENS = "<|startoftext|>", "<|endoftext|>", 77
CLIP = "openai/clip-vit-large-patch14"
HEAD = 64  # the width of an attention head, in all of them


@dataclass(frozen=True)
class Reader:
    """A text encoder of a checkpoint. `prefix` begins its tensors' names; OpenCLIP pads with "!".

    SD 2.x takes the states before the last layer, as if there were no last one (`drops` 1).
    """

    part: str
    prefix: str
    open_clip: bool = False
    drops: int = 0
    kind: type = CLIPTextModel

    @property
    def pad(self) -> str:
        return "!" if self.open_clip else END


KINDS = {
    "StableDiffusionXLPipeline": (
        Reader("text_encoder", "conditioner.embedders.0.transformer."),
        Reader("text_encoder_2", "conditioner.embedders.1.model.", True, kind=CLIPTextModelWithProjection),
    ),
    "StableDiffusionPipeline": (Reader("text_encoder", "cond_stage_model.transformer."),),
    "StableDiffusionPipeline of 2.x": (Reader("text_encoder", "cond_stage_model.model.", True, drops=1),),
}
OPEN_CLIP = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def read_checkpoint(file: Path, dtype: torch.dtype, tokenizer: str = "") -> tuple[str, dict[str, Any]]:
    """The pipeline's class by name, and its text encoders and tokenizers.

    `tokenizer` is the folder of the CLIP tokenizer (empty: looked for). BadInputError for a file of another kind or one
    that is not whole, and where no tokenizer is found.
    """
    if file.suffix.lower() != ".safetensors":
        raise BadInputError(
            f"{file} is no .safetensors file, and no other is read: a .ckpt may run code. Save the checkpoint as "
            ".safetensors (ComfyUI: Load Checkpoint, then Save Checkpoint)."
        )
    with (
        reading(f"{file} cannot be read", file, "Copy it again."),
        safe_open(file, framework="pt") as tensors,
    ):
        name = _kind(file, set(tensors.keys()))
        parts: dict[str, Any] = {}
        for reader in KINDS[name]:
            own = [key for key in tensors.keys() if key.startswith(reader.prefix)]
            held = {key.removeprefix(reader.prefix): tensors.get_tensor(key) for key in own}
            parts[reader.part] = text_encoder(file, reader, held, dtype)
    folder = find_tokenizer(file, tokenizer)
    for reader in KINDS[name]:
        rows = parts[reader.part].config.vocab_size
        part = reader.part.replace("text_encoder", "tokenizer")
        parts[part] = read_tokenizer(folder, reader.pad, rows)
    return name.partition(" ")[0], parts


def _kind(file: Path, keys: set[str]) -> str:
    """Which of KINDS has all its text encoders among the file's tensors."""
    for name, readers in KINDS.items():
        if all(any(key.startswith(reader.prefix) for key in keys) for reader in readers):
            return name
    raise BadInputError(
        f"{file} holds no text encoders of SD 1.5, SD 2.x or SDXL: none of its {len(keys)} tensors is named as theirs "
        f"(the first is {min(keys, default='missing')!r:.80}). Give a whole checkpoint, or the diffusers folder of the "
        "model."
    )


def text_encoder(file: Path, reader: Reader, held: Tensors, dtype: torch.dtype) -> Any:
    """The text encoder in `dtype`, of `held`, a checkpoint's tensors by their names behind the reader's prefix."""
    named = _of_open_clip(held) if reader.open_clip else _of_clip(held)
    layers = [int(found[1]) for name in named if (found := re.match(r"encoder\.layers\.(\d+)\.", name))]
    count = max(layers, default=-1) + 1 - reader.drops
    with_all = reader.kind is CLIPTextModelWithProjection
    kept = {
        name: tensor.to(dtype)
        for name, tensor in named.items()
        if not any(name.startswith(f"encoder.layers.{last}.") for last in range(count, count + reader.drops))
        and (with_all or name != "text_projection.weight")
    }
    with torch.device("meta"):
        model = reader.kind(_config(file, reader, kept, count))
    wrapped = hasattr(model, "text_model")
    own = {
        name if name == "text_projection.weight" or not wrapped else f"text_model.{name}": tensor
        for name, tensor in kept.items()
    }
    _check_names(file, reader, own, model)
    model.load_state_dict(own, strict=True, assign=True)
    _fill_places(model)
    return model.eval()


def _of_clip(held: Tensors) -> Tensors:
    """OpenAI's CLIP; some tools leave the outer name away, and old ones keep the places' numbers as a tensor."""
    names = {name.removeprefix("text_model."): tensor for name, tensor in held.items()}
    return {name: tensor for name, tensor in names.items() if not name.endswith("position_ids")}


def _of_open_clip(held: Tensors) -> Tensors:
    """OpenCLIP's names as transformers has them; the three parts of an attention's input taken apart."""
    found: Tensors = {}
    for name, tensor in held.items():
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "text_projection":
            found["text_projection.weight"] = tensor.T.contiguous()
            continue
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        if split := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name):
            for part, one in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{split[1]}.{part}_proj.{split[2]}"] = one.clone()
        else:
            found[name] = tensor
    return found


def _config(file: Path, reader: Reader, kept: Tensors, layers: int) -> CLIPTextConfig:
    """Read off the tensors' shapes."""
    try:
        rows, width = kept["embeddings.token_embedding.weight"].shape
        places = len(kept["embeddings.position_embedding.weight"])
        inner = len(kept["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise _incomplete(file, reader, [str(error)]) from error
    projection = kept.get("text_projection.weight")
    return CLIPTextConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD), max_position_embeddings=places,
        hidden_act="gelu" if reader.open_clip else "quick_gelu", layer_norm_eps=1e-5,
        projection_dim=width if projection is None else len(projection),
        bos_token_id=rows - 2, eos_token_id=rows - 1, pad_token_id=0 if reader.open_clip else rows - 1,
        architectures=[reader.kind.__name__],
    )  # fmt: skip


def _check_names(file: Path, reader: Reader, own: Tensors, model: Any) -> None:
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    if lacking := sorted(set(wanted) - set(own)):
        raise _incomplete(file, reader, lacking)
    other = [name for name, value in own.items() if wanted.get(name) != value.shape]
    if other:
        raise BadInputError(
            f"{file}: its text encoder ({reader.prefix}) has tensors that a CLIP of its size has not, such as "
            f"{other[0]} {tuple(own[other[0]].shape)}. Give the diffusers folder of the model."
        )


def _incomplete(file: Path, reader: Reader, lacking: list[str]) -> BadInputError:
    return BadInputError(
        f"{file}: its text encoder ({reader.prefix}) lacks {len(lacking)} tensors, such as {lacking[0]}. Give a whole "
        "checkpoint: one that was cut down to a part of the model does not do."
    )


def _fill_places(model: Any) -> None:
    """The numbers of the places, which no file holds: 0, 1, ... in a row."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_embedding.num_embeddings)[None]


def find_tokenizer(file: Path, given: str = "") -> Path:
    """The folder with the CLIP tokenizer that SD 1.5, SD 2.x and SDXL share, which no checkpoint file holds.

    `given`, or one beside the file, ComfyUI's own where the file or this pack lies in a ComfyUI, or the one that
    `hf download` has fetched. Nothing is downloaded. BadInputError says where one may be put.
    """
    for folder in [Path(given)] if given else _places(file):
        if _is_tokenizer(folder):
            return folder
    found = f"tokenizer is {given}, which lacks them" if given else f"none was found for {file.name}"
    raise BadInputError(
        f"A checkpoint needs a CLIP tokenizer, vocab.json and merges.txt with 49,408 tokens: {found}. ComfyUI has both "
        "in comfy/sd1_tokenizer/. Name their folder with --set tokenizer=FOLDER, put them into "
        f"{file.parent / 'tokenizer'}, set COMFYUI_PATH, or fetch them: hf download {CLIP} vocab.json merges.txt"
    )


def _places(file: Path) -> Iterator[Path]:
    yield file.parent / "tokenizer"
    for parent in (*file.resolve().parents, *Path(__file__).resolve().parents):
        yield parent / "comfy" / "sd1_tokenizer"
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser() / "comfy" / "sd1_tokenizer"
    found = try_to_load_from_cache(CLIP, "merges.txt")
    if isinstance(found, str):
        yield Path(found).parent


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def read_tokenizer(folder: Path, pad: str, rows: int) -> CLIPTokenizer:
    """The tokenizer, padding as a text encoder of `rows` tokens has learned it; BadInputError for one of others."""
    check_folder(folder)
    with reading(f"The tokenizer in {folder} cannot be read", folder):
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, pad_token=pad, model_max_length=TOKENS, bos_token=START, eos_token=END, unk_token=END,
            local_files_only=True,
        )  # fmt: skip
    if len(tokenizer) != rows:
        raise BadInputError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, the checkpoint's text encoder {rows}. Name the "
            "folder of the right one with --set tokenizer=FOLDER."
        )
    return tokenizer
