"""The families of LLMs that can tell a story, found by the `model_type` in a folder's config.json.

Every text-only causal LM of transformers is one family. Those that see keep their own vision tower, image tokens,
positions and chat template, and each is a small class here.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import BadInputError
from ...versions import INSTALLED, check_transformers
from .base import Family, VisionFamily
from .pictures import read_processor
from .qwen import Qwen3VL, QwenVL
from .square import Idefics3, InternVL, Llava

FAMILIES: dict[str, type[VisionFamily]] = {
    "llava": Llava,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "internvl": InternVL,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
}
OLDEST = "4.50"
# The first version of transformers with which a kind tells right, where that is later.
SINCE = dict.fromkeys(FAMILIES, "4.56") | {
    "qwen3_vl": "4.57", "gpt2": "4.52", "gemma2": "4.53", "gemma3_text": "4.53", "cohere2": "4.53",
}  # fmt: skip


def find_family(folder: Path) -> type[Family]:
    """The family of the LLM in `folder`.

    BadInputError, which lists those that are known, for any other kind; for one that the installed transformers is too
    old for; and for a folder that it is too old to read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_version(folder, config)
    return family_of(config.get("model_type"), folder)


def family_of(kind: str | None, place: Path) -> type[Family]:
    """The family of the LLM in `place` whose `model_type` is `kind`; BadInputError as in `find_family`."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Family
    raise BadInputError(
        f"{place} holds a model of the kind {kind!r} (its model_type), which cannot tell a story here: give a "
        f"text-only causal LM that transformers {INSTALLED} knows (llama, qwen2, mistral and so on) or one that sees, "
        f"which can be {', '.join(FAMILIES)}."
    )


def _check_version(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type", "")
    check_transformers(f"{folder} holds a model of the kind {kind!r}", SINCE.get(kind, OLDEST))
    # Transformers 5 keeps the base of rotary positions under another name, which those before pass over without a word.
    text = config.get("text_config", config)
    if "rope_parameters" in text and "rope_theta" not in text:
        check_transformers(f"{folder} was saved with rope_parameters in its config.json", "5")


def load_family(
    kind: type[Family], folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Family:
    """A family with what its LLM's folder says about pictures; `tokenizer` gets the family's template and end mark."""
    return kind(config, tokenizer, read_processor(folder)) if issubclass(kind, VisionFamily) else kind()
