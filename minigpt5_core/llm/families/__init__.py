"""The families of LLMs that can tell a story, found by the `model_type` in a folder's config.json.

All text-only causal LMs of transformers are one family. Vision-language models keep their own vision tower, image
tokens, positions and chat template; each family of them is a small class.
"""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import BadInputError
from ...own_code import code_refusal, has_code
from ...texts import read_json
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
# The first version of transformers that computes a kind correctly, where that is later.
SINCE = dict.fromkeys(FAMILIES, "4.56") | {
    "qwen3_vl": "4.57", "gpt2": "4.52", "gemma2": "4.53", "gemma3_text": "4.53", "cohere2": "4.53",
}  # fmt: skip


def find_family(folder: Path) -> type[Family]:
    """The family of the LLM in `folder`.

    BadInputError for any other kind, with a list of those that are known, or if it needs code of its own; and for a
    kind or a folder that needs a later version of transformers than the installed one.
    """
    config = read_json(folder / "config.json")
    _check_version(folder, config)
    if has_code(config) and config.get("model_type") not in {*FAMILIES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}:
        raise code_refusal(folder)
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
    # Transformers 5 keeps the base of rotary positions under another name, which older versions ignore silently.
    text = config.get("text_config", config)
    if "rope_parameters" in text and "rope_theta" not in text:
        check_transformers(f"{folder} was saved with rope_parameters in its config.json", "5")


def load_family(
    kind: type[Family], folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Family:
    """A family with what its LLM's folder says about pictures; may set another eos token in `tokenizer`."""
    return kind(config, tokenizer, read_processor(folder)) if issubclass(kind, VisionFamily) else kind()
