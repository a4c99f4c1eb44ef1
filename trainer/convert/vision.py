"""The vision path under LAVIS's, EVA's or Hugging Face's names, as our QFormerEncoder's tensors.

ViT and ln_vision, Q-Former without its text branch, query tokens (arXiv 2301.12597, 2304.10592).
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.vision.qformer import QFormerConfig

from .pickles import read_folder, read_tensors
from .report import Report

# EVA's own file ends with a block that BLIP-2 never runs.
EVA_BLOCKS = 40
EVA = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.weight$", r"encoder.layers.\1.self_attn.qkv.weight"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
QUERY_OR_VALUE = re.compile(r"^blocks\.(\d+)\.attn\.(q|v)_bias$")
BERT = (
    (r"^(bert\.)?embeddings\.(LayerNorm|layernorm)\.", "layernorm."),
    (r"^bert\.", ""),
    (r"attention\.self\.", "attention.attention."),
)
# What the Q-Former has for reading text, which a picture's way never meets.
TEXT = re.compile(
    r"^(bert\.)?embeddings\.(word|position)|^cls\.|^(bert\.)?encoder\.layer\.\d+\.(intermediate|output)\."
)
HEAD = re.compile(
    r"^(norm|fc_norm|head)\.|^mask_token$|relative_position_index$"
)  # EVA's, of its own training
NO_PART = "no part of the picture's way"


def read_source(path: Path) -> dict[str, Tensor]:
    """A pickled file's tensors, or those of a Hugging Face folder."""
    return read_folder(path) if path.is_dir() else read_tensors(path, "model", "module", "state_dict")


def vision_tensors(vit: dict[str, Tensor], qformer: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Both files' tensors under our encoder's names, without the projector; works on meta tensors too.

    Raises BadInputError where a file has not the part it was given for, or has one that is not known.
    """
    blocks = _vit(vit, report)
    return blocks | _last_norm(qformer, report) | _qformer(qformer, report)


def vision_config(tensors: dict[str, Tensor], llm_width: int, vit_heads: int, heads: int) -> QFormerConfig:
    """All sizes, read off the tensors under our names; the numbers of heads are in none of them."""
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    positions = tensors["vision_model.embeddings.position_embedding"].shape[1] - 1
    queries = tensors["query_tokens"]
    crossed = sorted({_layer(name) for name in tensors if ".crossattention." in name})
    layers = len({_layer(name) for name in tensors if name.startswith("qformer.encoder.")})
    return QFormerConfig(
        llm_width=llm_width,
        size=math.isqrt(positions) * patch.shape[-1],
        patch=patch.shape[-1],
        vision_width=len(patch),
        vision_hidden=len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        vision_layers=len({_layer(name) for name in tensors if name.startswith("vision_model.encoder.")}),
        vision_heads=vit_heads,
        queries=queries.shape[1],
        width=queries.shape[2],
        hidden=len(tensors["qformer.encoder.layer.0.intermediate_query.dense.weight"]),
        layers=layers,
        heads=heads,
        cross_every=crossed[1] if len(crossed) > 1 else layers,
    )


def _layer(name: str) -> int:
    return int(re.search(r"\.layers?\.(\d+)\.", name)[1])  # type: ignore[index]


def _vit(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    for prefix in ("vision_model.", "visual_encoder.", ""):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own:
            break
    _leave(set(tensors) - set(own), "vit", report, NO_PART)
    if prefix == "vision_model.":
        mine = {name: name for name in own if ".post_layernorm." not in name}
        _use(mine, "vit", report)
        return {name: own[name] for name in mine}
    plain = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    if "cls_token" not in plain or "pos_embed" not in plain:
        raise BadInputError(
            "--vit holds no EVA ViT: neither visual_encoder.cls_token nor cls_token, and no vision_model. Give "
            "eva_vit_g.pth, a LAVIS file with visual_encoder, or a folder of BLIP-2."
        )
    return _eva(plain, prefix, report)


def _eva(plain: dict[str, Tensor], prefix: str, report: Report) -> dict[str, Tensor]:
    count = 1 + max(int(name.split(".")[1]) for name in plain if name.startswith("blocks."))
    unused = f"blocks.{EVA_BLOCKS - 1}." if not prefix and count == EVA_BLOCKS else None
    ours, left = {}, set()
    for name in plain:
        if (unused and name.startswith(unused)) or HEAD.search(name):
            left.add(prefix + name)
        elif not QUERY_OR_VALUE.match(name):
            ours[name] = "vision_model." + _renamed(name, EVA, "--vit")
    found = {mine: plain[theirs] for theirs, mine in ours.items()}
    biases = {name for name in plain if QUERY_OR_VALUE.match(name) and prefix + name not in left}
    for name in sorted(biases):
        if name.endswith("q_bias"):
            layer = name.split(".")[1]
            mine = f"vision_model.encoder.layers.{layer}.self_attn.qkv.bias"
            found[mine] = _joined(plain[name], plain.get(name.replace("q_bias", "v_bias")), name)
            ours |= {name: mine, name.replace("q_bias", "v_bias"): mine}
    _use({prefix + theirs: mine for theirs, mine in ours.items()}, "vit", report)
    _leave(left, "vit", report, "the published model stops before it")
    return found


def _joined(query: Tensor, value: Tensor | None, name: str) -> Tensor:
    """EVA's keys have no bias."""
    if value is None:
        raise BadInputError(f"--vit has {name} and no v_bias beside it. Is the file whole?")
    return torch.cat((query, torch.zeros_like(query), value))


def _last_norm(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    ours = {}
    for theirs in ("ln_vision.", "vision_model.post_layernorm."):
        for name in tensors:
            if name.startswith(theirs):
                ours[name] = "vision_model.post_layernorm." + name.removeprefix(theirs)
    if not ours:
        raise BadInputError(
            "--qformer has no ln_vision (in BLIP-2's folders: vision_model.post_layernorm), the norm between ViT and "
            "Q-Former. Give LAVIS's file of the Q-Former, such as blip2_pretrained_flant5xxl.pth."
        )
    _use(ours, "qformer", report)
    return {mine: tensors[theirs] for theirs, mine in ours.items()}


def _qformer(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    prefix = "Qformer." if any(name.startswith("Qformer.") for name in tensors) else "qformer."
    own = {name for name in tensors if name.startswith(prefix)}
    if not own or "query_tokens" not in tensors:
        raise BadInputError(
            "--qformer holds no Q-Former (Qformer. or qformer.) with query_tokens. Give LAVIS's file, such as "
            "blip2_pretrained_flant5xxl.pth, or a folder of BLIP-2 or InstructBLIP."
        )
    text = {name for name in own if TEXT.search(name.removeprefix(prefix))}
    ours = {
        name: "qformer." + _substituted(name.removeprefix(prefix), BERT)
        for name in tensors
        if name in own - text
    }
    ours["query_tokens"] = "query_tokens"
    _use(ours, "qformer", report)
    _leave(text, "qformer", report, "for text, which a picture's way never meets")
    rest = {name for name in set(tensors) - set(ours) - text if f"qformer: {name}" not in report.used}
    _leave(rest, "qformer", report, NO_PART)
    return {mine: tensors[theirs] for theirs, mine in ours.items()}


def _substituted(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in table:
        name = re.sub(pattern, ours, name)
    return name


def _renamed(name: str, table: tuple[tuple[str, str], ...], flag: str) -> str:
    ours = _substituted(name, table)
    if ours == name:
        raise BadInputError(f"{flag} holds {name}, which an EVA ViT has not. Is it another model's file?")
    return ours


def _use(names: dict[str, str], source: str, report: Report) -> None:
    report.used |= {f"{source}: {theirs}": f"qformer.safetensors: {ours}" for theirs, ours in names.items()}


def _leave(names: set[str], source: str, report: Report, why: str) -> None:
    report.left_over |= {f"{source}: {name}": why for name in sorted(names)}
