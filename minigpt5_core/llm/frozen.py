"""The frozen LLM behind one small class: any decoder LLM of `transformers`, with V voken rows added.

Shape letters: B batch, K image tokens, L llm width, S sequence, W width of what stands in the sequence (L, or more
where a family tells its decoder more about a picture).
"""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import BadInputError
from ..vision.encoder import ImageEncoder
from ..vision.qformer import QFormerEncoder
from ..vokens import PICTURE
from .adapter import Adapter
from .chat import Chat, find_chat, special_ids
from .families.base import Family, VisionFamily
from .unmerged_lora import UnmergedLora

MOST_SEEN = 256  # pictures whose image tokens are kept


@dataclass(frozen=True, eq=False)
class FrozenLLM:
    """A causal LM and its tokenizer, both with vokens. Nothing of it needs gradients until an adapter is trained.

    Never assigned to: each `with_...` method returns another FrozenLLM, which shares tokenizer and causal LM with this
    one, and so also what is merged into the causal LM's weights later.

    `causal_lm` may carry PEFT layers. It sees pictures by an `image_encoder`, or by itself where its `family` does;
    `seen` keeps the image tokens of the latest pictures, `chats` how its chat templates word a conversation. A learned
    `prefix` makes a cache for so many stories that begins with it. `bos_id` is the id that an adapter's prompts begin
    with, None where the tokenizer decides. `unmerged_lora` is LoRA of quantized weights: `read` applies it, `causal_lm`
    called by itself does not. `tied_head`: whether embedding and head are one matrix. It is found out once, when the
    LLM is loaded: later a host may have put other tensors in place of the weights, as ComfyUI's patches do, and the tie
    no longer shows.
    """

    tokenizer: PreTrainedTokenizerBase
    causal_lm: PreTrainedModel
    voken_ids: list[int]
    image_encoder: ImageEncoder | QFormerEncoder | None = None
    prefix: Callable[[int], DynamicCache] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    family: Family = field(default_factory=Family)
    bos_id: int | None = None
    unmerged_lora: tuple[UnmergedLora, ...] = ()
    tied_head: bool | None = None
    chats: dict[str, Chat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tied_head is None:
            embedding, head = self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()
            object.__setattr__(self, "tied_head", head is not None and head.weight is embedding.weight)

    @property
    def has_vision(self) -> bool:
        """Whether it can be shown pictures."""
        return self.image_encoder is not None or self.family.has_vision

    @property
    def chat(self) -> Chat:
        """How its chat template words a conversation, found out once; BadInputError for one that cannot be used."""
        template = repr(self.tokenizer.chat_template)
        if template not in self.chats:
            self.chats[template] = find_chat(self.tokenizer, self.family, self._known_ends())
        return self.chats[template]

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end a reply, whichever comes first: a model may have been trained with several."""
        return self._known_ends() | {self.chat.end}

    def _known_ends(self) -> set[int]:
        """The tokenizer's, and those of generation_config.json, where a list of plain words may stand by default."""
        said = getattr(getattr(self.causal_lm, "generation_config", None), "eos_token_id", None)
        more = set(said if isinstance(said, (list, tuple)) else [said])
        known = special_ids(self.tokenizer) - {*self.voken_ids, self.picture_id}
        own = {self.tokenizer.eos_token_id} - {None}
        return own | (more & known)

    @property
    def width(self) -> int:
        """L."""
        return self.causal_lm.config.get_text_config().hidden_size

    @property
    def context(self) -> int:
        """The longest sequence the LLM can read, in tokens: what it was made for, less a prefix."""
        longest = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        if longest is None:  # no positions to run out of: what its tokenizer says, or no end
            longest = int(self.tokenizer.model_max_length)
        return longest - self.begin(1).get_seq_length()

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def decoder(self) -> nn.Module:
        """The model without its head; its `last_hidden_state` is after the final norm."""
        whole = self.causal_lm.base_model
        # Some text-only kinds of transformers 4 know their decoder by this name alone, others by the other alone.
        if self.family.has_vision or whole is self.causal_lm:
            return self.causal_lm.get_decoder()
        return whole

    def begin(self, rows: int) -> DynamicCache:
        """The keys and values that `rows` stories begin with: none, or a learned prefix."""
        return DynamicCache() if self.prefix is None else self.prefix(rows)

    def with_vision(self, image_encoder: ImageEncoder | QFormerEncoder) -> "FrozenLLM":
        """This LLM with an image encoder, which is shared and stays as it is; it has seen nothing yet."""
        return replace(self, image_encoder=image_encoder, seen={})

    def with_prefix(self, prefix: Callable[[int], DynamicCache] | None) -> "FrozenLLM":
        """This LLM with a learned prefix, if one is given; BadInputError if it has one already."""
        if prefix is not None and self.prefix is not None:
            raise BadInputError(
                "This LLM already has an adapter with a prefix, and only one can stand in front. Load a single one."
            )
        return self if prefix is None else replace(self, prefix=prefix)

    def with_adapter(self, adapter: Adapter, unmerged: UnmergedLora | None = None) -> "FrozenLLM":
        """This LLM with the parts of an adapter that are not merged: its prefix, its bos id and its unmerged LoRA.

        The weights stay as they are: merging rows and LoRA is the caller's affair (`merge_adapter`, or ComfyUI's
        patches). BadInputError for a second prefix.
        """
        llm = self.with_prefix(adapter.prefix)
        llm = llm if adapter.bos_id is None else replace(llm, bos_id=adapter.bos_id)
        return llm if unmerged is None else replace(llm, unmerged_lora=(*llm.unmerged_lora, unmerged))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) ids -> (B, S, L)."""
        return self.causal_lm.get_input_embeddings()(ids)

    def logits(self, states: Tensor) -> Tensor:
        """(..., L) last-layer states -> (..., vocabulary)."""
        return self.causal_lm.get_output_embeddings()(states)

    def read(self, inputs: Tensor, **arguments: Any) -> Any:
        """The decoder's answer to (B, S, W) text and pictures, in the family's layout, with unmerged LoRA applied."""
        with ExitStack() as applied:
            for lora in self.unmerged_lora:
                applied.enter_context(lora.applied_to(self.causal_lm))
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
        """(H, W, 3) in [0, 1] -> (K, W) image tokens, computed once a picture; None for an LLM without vision."""
        if self.image_encoder is not None:
            square = self.image_encoder.prepare(picture[None])
            return self._once(square, lambda: self._encoded(square))
        if isinstance(family := self.family, VisionFamily):
            return self._once(picture, lambda: family.see(self.causal_lm, picture))
        return None

    def _encoded(self, square: Tensor) -> Tensor:
        assert self.image_encoder is not None
        return self.image_encoder(square.to(self.image_encoder.projector.weight))[0]

    def _once(self, picture: Tensor, tokens: Callable[[], Tensor]) -> Tensor:
        """The image tokens kept for a picture, or else `tokens()`, which are kept from now on."""
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
