"""What the rest of the code asks of a family of LLMs, for the text-only ones; and what families with vision share.

A picture is a tensor (K, W) of its K image tokens. Its first L columns are the vectors that stand in the sequence; the
other W - L, if any, hold what else a family's decoder needs to know about each token.

Shape letters: A axes of a position (1, or 3 for multimodal rotary positions), B batch, K image tokens, L llm width,
S sequence.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from ...errors import BadInputError

Placed = tuple[int, Tensor]  # where a picture's first token stands, and the picture


class Family:
    """A text-only causal LM. Pictures reach it, if at all, as plain vectors that an image encoder of ours makes.

    `before` and `after` are written around a picture's tokens.
    """

    model_class: Any = AutoModelForCausalLM
    has_vision = False
    axes = 1
    before = after = ""

    def content(self, text: str) -> Any:
        """A message's text as the chat template takes it."""
        return text

    def widen(self, embedded: Tensor) -> Tensor:
        """(..., L) embedded text -> (..., W), to stand in one sequence with pictures."""
        return embedded

    def decoder_inputs(self, inputs: Tensor) -> dict[str, Any]:
        """(B, S, W) -> the decoder's arguments for what stands in the sequence."""
        return {"inputs_embeds": inputs}

    def positions(self, length: int, placed: Sequence[Placed]) -> Tensor:
        """(A, S) position ids of a sequence from its beginning, `length` tokens with those of pictures."""
        return torch.arange(length)[None]


class VisionFamily(Family):
    """A vision-language model of transformers. `processor` is its image processor's configuration.

    Simplified: a picture is encoded whole, where some families' processors cut large ones into tiles. It is written
    into the text at its place in the story, between `before` and `after`, and not as an image item of the chat
    template, which some templates move to the front of the message.
    """

    model_class = AutoModelForImageTextToText
    has_vision = True

    def __init__(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, processor: dict[str, Any]
    ) -> None:
        self.width = config.get_text_config().hidden_size
        self.processor = processor
        self.prepare(tokenizer)
        _check_tokens(tokenizer, self.before + self.after + (tokenizer.eos_token or ""))

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets the tokenizer's eos token, for a family that ends a reply with another."""
        return None

    def content(self, text: str) -> Any:
        return [{"type": "text", "text": text}]

    @abstractmethod
    def see(self, model: PreTrainedModel, picture: Tensor) -> Tensor:
        """(H, W, 3) in [0, 1] -> (K, W), by the model's own vision tower and projector."""

    def vision(self, model: PreTrainedModel) -> nn.Module:
        """All of the model but its decoder and head: its weights tell whether two models encode pictures alike."""
        parts = model.model.named_children()
        return nn.ModuleDict({name: part for name, part in parts if part is not model.get_decoder()})


def _check_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """BadInputError unless a text consists of tokens that were added to the tokenizer."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not set(ids) <= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
        raise BadInputError(
            f"The tokenizer does not know {text} as special tokens, which this family writes around a picture. Copy "
            "the tokenizer's files from where the model came from."
        )


def features(answer: Any) -> Any:
    """The features in the answer of `get_image_features`, a row for each picture; transformers 4 returns them bare."""
    return answer.pooler_output if isinstance(answer, ModelOutput) else answer


def placed(ids: list[int], pictures: Sequence[Tensor], slot: int | None) -> Iterator[Placed]:
    """Where each picture begins in ids that repeat the slot's id for every image token."""
    start = 0
    for picture in pictures:
        start = ids.index(slot, start)  # type: ignore[arg-type]
        yield start, picture
        start += len(picture)


def stack_positions(positions: Sequence[Tensor]) -> Tensor:
    """(A, S) of each row, padded behind with 0 -> (B, S), or (A, B, S) where a position has several axes."""
    padded = nn.utils.rnn.pad_sequence([row.T for row in positions], batch_first=True)  # (B, S, A)
    return padded[..., 0] if padded.shape[-1] == 1 else padded.permute(2, 0, 1)
