"""The frozen LLM behind one small class: any decoder LLM of `transformers`, with V voken rows added."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapter import OTHER_LLM, Adapter, merge_adapter, read_adapter, take_beside
from .beside import Beside, keep_layout
from .errors import BadInputError
from .families import find_family, load_family
from .families.base import Family, SeeingFamily
from .gguf_files import OTHER_FILE, is_whole, read_gguf
from .own_code import check_folder, code_refusal, forget_code, wants_code
from .prefix import Prefix
from .qformer import QFormerEncoder, load_qformer
from .versions import has_transformers
from .vision import ImageEncoder, load_image_adapter
from .vokens import PICTURE, voken_strings
from .weights import IMAGE_ADAPTER, QFORMER, gguf_in, hash_weights

# What transformers and diffusers raise for a folder that is broken or foreign. safetensors has its own error,
# which derives from Exception; ImportError says which package a tokenizer or a model class needs. A GGUF file that
# is cut short ends in the midst of a number (struct.error) or a list (IndexError).
UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, SafetensorError,
    struct.error,
)  # fmt: skip

# What from_pretrained calls the type of the weights.
DTYPE = "dtype" if has_transformers("4.56") else "torch_dtype"
MOST_SEEN = 256  # pictures whose image tokens are kept


@dataclass
class FrozenLLM:
    """A causal LM and its tokenizer, both with vokens. Nothing of it needs gradients until an adapter is trained.

    `causal_lm` may carry PEFT layers; `width` is L. It sees by an `image_encoder`, or by itself where its `family`
    does. A learned `prefix` gives a cache for so many stories that begins with it. `bos_id` is what an adapter's
    prompts begin with, None where it is the tokenizer's own affair. `beside` is LoRA that could not be merged: `read`
    lays it on, `causal_lm` itself answers without.
    """

    tokenizer: PreTrainedTokenizerBase
    causal_lm: PreTrainedModel
    voken_ids: list[int]
    image_encoder: ImageEncoder | QFormerEncoder | None = None
    prefix: Callable[[int], DynamicCache] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    family: Family = field(default_factory=Family)
    bos_id: int | None = None
    beside: tuple[Beside, ...] = ()

    @property
    def sees(self) -> bool:
        """Whether it can be shown pictures."""
        return self.image_encoder is not None or self.family.sees

    @property
    def width(self) -> int:
        return self.causal_lm.config.get_text_config().hidden_size

    @property
    def context(self) -> int:
        """The longest sequence the LLM can read, in tokens: what it was made for, less a prefix."""
        longest = self.causal_lm.config.get_text_config().max_position_embeddings
        return longest - self.begin(1).get_seq_length()

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def decoder(self) -> nn.Module:
        """The model without its head; its `last_hidden_state` is after the final norm."""
        whole = self.causal_lm.base_model
        # Some text-only kinds of transformers 4 know their decoder by this name alone, others by the other alone.
        return self.causal_lm.get_decoder() if self.family.sees or whole is self.causal_lm else whole

    def begin(self, rows: int) -> DynamicCache:
        """The keys and values that `rows` stories begin with: none, or a learned prefix."""
        return DynamicCache() if self.prefix is None else self.prefix(rows)

    def prefixed(self, prefix: Prefix | None) -> "FrozenLLM":
        """This LLM with a learned prefix in front, where there is one; BadInputError for a second one."""
        if prefix is not None and self.prefix is not None:
            raise BadInputError(
                "This LLM already has an adapter with a prefix, and only one can stand in front."
            )
        return self if prefix is None else replace(self, prefix=prefix)

    def adapted(self, adapter: Adapter, beside: Beside | None = None) -> "FrozenLLM":
        """This LLM with what of an adapter is in no weight: a prefix, a beginning of its own, LoRA beside weights."""
        llm = self.prefixed(adapter.prefix)
        llm = llm if adapter.bos_id is None else replace(llm, bos_id=adapter.bos_id)
        return llm if beside is None else replace(llm, beside=(*llm.beside, beside))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) ids -> (B, S, L)."""
        return self.causal_lm.get_input_embeddings()(ids)

    def logits(self, states: Tensor) -> Tensor:
        """(..., L) last-layer states -> (..., vocabulary)."""
        return self.causal_lm.get_output_embeddings()(states)

    def read(self, inputs: Tensor, **arguments: Any) -> Any:
        """The decoder's answer to (B, S, W) text and pictures, as the family lays them out."""
        with ExitStack() as laid:
            for lora in self.beside:
                laid.enter_context(lora.laid_on(self.causal_lm))
            return self.decoder(**self.family.decoder_inputs(inputs), **arguments)

    @property
    def picture_id(self) -> int:
        """The id of a picture's slot in a prompt; it has no row in the LLM."""
        return self.tokenizer.convert_tokens_to_ids(PICTURE)

    @property
    def picture_opens(self) -> int:
        """The first id that is written for a picture: the slot's, or that of what the family writes before it."""
        return self.encode(self.family.before)[0] if self.family.before else self.picture_id

    @torch.no_grad()
    def see(self, picture: Tensor) -> Tensor | None:
        """(H, W, 3) in [0, 1] -> (K, W) image tokens, computed once a picture; None for an LLM that does not see."""
        if self.image_encoder is not None:
            square = self.image_encoder.prepare(picture[None])
            return self._once(square, lambda: self._encoded(square))
        if isinstance(family := self.family, SeeingFamily):
            return self._once(picture, lambda: family.see(self.causal_lm, picture))
        return None

    def _encoded(self, square: Tensor) -> Tensor:
        assert self.image_encoder is not None
        return self.image_encoder(square.to(self.image_encoder.projector.weight))[0]

    def _once(self, picture: Tensor, tokens: Callable[[], Tensor]) -> Tensor:
        """What is kept for a picture, or else `tokens()`."""
        shape = repr(tuple(picture.shape)).encode()
        key = hashlib.sha256(shape + picture.cpu().numpy().tobytes()).hexdigest()
        if key not in self.seen:
            self.seen[key] = tokens().float().cpu()
            if len(self.seen) > MOST_SEEN:
                del self.seen[next(iter(self.seen))]
        return self.seen[key]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that already holds its special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def load_llm(
    folder: Path,
    vokens: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Any = None,
) -> FrozenLLM:
    """Reads a Hugging Face folder and adds `vokens` rows, each the mean of all others, after its own.

    `folder` may be a GGUF file too, or hold a single one in place of safetensors. `quantization` is one of
    transformers' configurations, such as BitsAndBytesConfig. Raises BadInputError when the folder holds no LLM of a
    known family that transformers can read from safetensors or GGUF.
    """
    if file := gguf_in(folder):
        return _load_gguf(file, vokens, dtype, device, quantization)
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{folder} is no Hugging Face model folder (it has no config.json). Give a folder that holds config.json, "
            "safetensors weights and a tokenizer, or a .gguf file, or make the default one: "
            "python -m minigpt5_core get-llm"
        )
    if not any(folder.glob("*.safetensors")):
        raise BadInputError(
            f"{folder} holds no .safetensors weights, and pickled ones (.bin) are never read. Save the model again "
            "with transformers' save_pretrained, which writes safetensors."
        )
    with reading(f"The LLM in {folder} cannot be read", folder):
        kind = find_family(folder)
        check_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        small = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
        model = kind.model_class.from_pretrained(
            folder,
            config=forget_code(config),
            **{DTYPE: dtype},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **small,
        )
        if quantization:  # it lies where it belongs, and is not to be moved
            keep_layout(model)
        else:
            model = model.to(device)
        family = load_family(kind, folder, model.config, tokenizer)
    return add_vokens(tokenizer, model, vokens, family)


def _load_gguf(
    file: Path, vokens: int, dtype: torch.dtype, device: str | torch.device, quantization: Any
) -> FrozenLLM:
    if quantization:
        raise BadInputError(
            f"{file} is a GGUF file, which is unpacked to be read and cannot be held in 4 bits. Take another precision "
            "(bf16), or give the same model as a Hugging Face folder with safetensors weights."
        )
    with reading(f"The LLM in {file} cannot be read", file, OTHER_FILE):
        tokenizer, model = read_gguf(file, dtype)
    return add_vokens(tokenizer, model.to(device), vokens)


def add_vokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, vokens: int, family: Family | None = None
) -> FrozenLLM:
    """Adds voken tokens to a tokenizer and their rows to a model, and freezes the model."""
    strings = voken_strings(vokens)
    known = tokenizer.get_vocab()  # those already there keep their ways with the white space beside them
    tokenizer.add_tokens([name for name in (*strings, PICTURE) if name not in known], special_tokens=True)
    voken_ids = tokenizer.convert_tokens_to_ids(strings)
    rows = model.get_input_embeddings().num_embeddings
    if max(voken_ids) >= rows:
        model.resize_token_embeddings(max(voken_ids) + 1, mean_resizing=False)
    llm = FrozenLLM(tokenizer, model.requires_grad_(False).eval(), voken_ids, family=family or Family())
    others = [index for index in range(rows) if index not in set(voken_ids)]
    for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        with torch.no_grad():
            table.weight[voken_ids] = table.weight[others].mean(0)
    return llm


def load_adapter(llm: FrozenLLM, folder: Path) -> FrozenLLM:
    """Lays a PEFT adapter (voken rows, LoRA or a prefix) over the LLM for use, in memory; files are never touched.

    LoRA of weights in 4 bits stays beside them, all else is merged. Raises BadInputError when the folder is no whole
    PEFT adapter or was trained for another LLM.
    """
    with reading(f"The adapter in {folder} does not fit an LLM of width {llm.width}", folder, OTHER_LLM):
        adapter = read_adapter(folder, llm.causal_lm, llm.voken_ids)
    merged, beside = take_beside(llm.causal_lm, adapter)
    merge_adapter(llm.causal_lm, merged)
    return llm.adapted(adapter, beside.to(llm.device) if beside else None)


def load_sight(
    llm: FrozenLLM, folder: Path, spare: Path | None = None, chosen: Path | None = None
) -> FrozenLLM:
    """Lets the LLM of `folder` see: by the `chosen` image adapter, by what is in its folder, or by `spare`.

    In its folder may be an image adapter or a converted Q-Former. `spare` serves only the weights it was trained for;
    an LLM without any stays blind. Raises BadInputError for one, chosen or in the folder, that is broken or for another
    width.
    """
    if llm.family.sees:
        if chosen:
            raise BadInputError(f"The LLM in {folder} sees by itself. Leave the image adapter {chosen} out.")
        return llm
    encoder: ImageEncoder | QFormerEncoder
    if chosen is None and (folder / QFORMER).is_file():
        encoder = load_qformer(folder / QFORMER, llm.causal_lm.dtype)
        _check_width(llm, folder / QFORMER, encoder.config.llm_width)
    elif chosen or (folder / IMAGE_ADAPTER).is_file():
        encoder, header = load_image_adapter(chosen or folder / IMAGE_ADAPTER)
        _check_width(llm, chosen or folder / IMAGE_ADAPTER, header.llm_width, header.llm_id)
    elif spare is not None and spare.is_file():
        encoder, header = load_image_adapter(spare)
        if header.llm_hash != hash_weights(folder):
            return llm
    else:
        return llm
    llm.image_encoder = encoder.requires_grad_(False).to(llm.device)
    return llm


def has_sight(folder: Path) -> bool:
    """Whether the folder of an LLM holds what it sees with."""
    return any((folder / name).is_file() for name in (IMAGE_ADAPTER, QFORMER))


def _check_width(llm: FrozenLLM, file: Path, width: int, llm_id: str = "it was converted with") -> None:
    if width != llm.width:
        raise BadInputError(
            f"{file} was trained for the LLM {llm_id} of width {width}, but this one is {llm.width} wide. Leave it "
            "out, or train one for this LLM: python -m trainer image-adapter"
        )


@contextmanager
def reading(trouble: str, folder: Path, cure: str = "") -> Iterator[None]:
    """Turns what the libraries raise for files they cannot use into BadInputError: `trouble`, why, and `cure`.

    Where `folder` is a GGUF file or holds a safetensors file that is not whole, that is the reason given, whatever was
    raised.
    """
    try:
        yield
    except BadInputError:
        raise
    except UNREADABLE as error:
        if wants_code(error):
            raise code_refusal(folder) from error
        if broken := _cut_short(folder):
            raise BadInputError(
                f"{broken} is not a whole {broken.suffix[1:]} file. It may be cut short: copy it again."
            ) from error
        raise BadInputError(f"{trouble}: {_first_line(error)} {cure}".rstrip()) from error


def _cut_short(folder: Path) -> Path | None:
    if folder.suffix == ".gguf" and folder.is_file():
        return None if is_whole(folder) else folder
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
        except OSError:  # missing or locked, which the error at hand says
            continue
    return None


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):  # its text is the bare key
        return f"{error} is missing."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
