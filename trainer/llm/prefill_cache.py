"""What stands before a voken block, with its keys and values computed once.

In stage 1 the LLM is frozen, so a caption, or a story up to one of its pictures, carries no gradient: its keys and
values are computed once without it, and a training step runs the voken blocks alone. One pass over a story serves
all its pictures.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import Turn, chat_text

from ..data.source import Passage, PictureTarget
from .sequences import check_context


@dataclass(frozen=True)
class PrefilledContext:
    """All that stands before one picture.

    `values` (layers, 2, heads, S, d) are the whole passage's keys and values, of which the first `length` positions
    count, a learned prefix among them; `last` (L,) is the state that predicts [IMG0].
    """

    values: Tensor
    length: int
    last: Tensor
    target: PictureTarget


def caption_ids(llm: FrozenLLM, caption: str) -> list[int]:
    """The ids up to where [IMG0] is predicted: the caption as a request, the reply still empty."""
    return llm.encode(chat_text(llm, [Turn(caption)]))


class PrefillCache:
    """The contexts of all passages, in order of length, so that a batch needs little padding."""

    def __init__(
        self, llm: FrozenLLM, passages: Sequence[Passage], batch: int = 8, dtype: torch.dtype = torch.float32
    ) -> None:
        ordered = sorted(passages, key=lambda passage: len(passage.ids))
        check_context(llm, [*ordered[-1].ids, *llm.voken_ids] if ordered else [])
        self.contexts: list[PrefilledContext] = []
        with tqdm(total=len(ordered), desc="keys and values", mininterval=5) as bar:
            for first in range(0, len(ordered), batch):
                part = ordered[first : first + batch]
                self.contexts += _prefill(llm, part, dtype)
                bar.update(len(part))
        self.contexts.sort(key=lambda context: context.length)

    def sample(self, batch: int, rng: random.Random) -> list[PrefilledContext]:
        """`batch` contexts, drawn from a stretch of neighbours in length around a random one."""
        reach = 4 * batch
        middle = rng.randrange(len(self.contexts))
        first = max(0, min(middle - reach // 2, len(self.contexts) - reach))
        return rng.choices(self.contexts[first : first + reach], k=batch)


@torch.no_grad()
def _prefill(llm: FrozenLLM, passages: Sequence[Passage], dtype: torch.dtype) -> list[PrefilledContext]:
    rows = [torch.tensor(passage.ids, device=llm.device) for passage in passages]
    # padding stands behind everything that counts, and attention is causal: no mask
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    begun = llm.begin(len(rows))
    prefix = begun.get_seq_length()
    positions = torch.arange(prefix, prefix + ids.shape[1], device=llm.device)
    output = _read(llm, ids, positions, past_key_values=begun)
    layers = [torch.stack((layer.keys, layer.values), 1) for layer in output.past_key_values.layers]
    values = torch.stack(layers, 1).to(dtype)  # (B, layers, 2, heads, S, d)
    return [
        PrefilledContext(kept, prefix + length, output.last_hidden_state[row, length - 1].clone(), target)
        for row, passage in enumerate(passages)
        for kept in [values[row, :, :, :, : prefix + len(passage.ids)].clone()]
        for length, target in passage.pictures
    ]


def block_states(llm: FrozenLLM, contexts: Sequence[PrefilledContext]) -> Tensor:
    """Voken states (B, V, L) behind prefilled contexts; the gradient reaches the voken rows only.

    The state that predicts [IMG0] is the context's last one, so only [IMG0] .. [IMG(V-2)] are run.
    """
    lengths = torch.tensor([context.length for context in contexts], device=llm.device)
    longest = int(lengths.max())
    ids = torch.tensor(llm.voken_ids[:-1], device=llm.device).expand(len(contexts), -1)
    positions = torch.arange(longest + ids.shape[1], device=llm.device)
    shift = longest - lengths[:, None]  # contexts are padded in front
    output = _read(
        llm,
        ids,
        positions[longest:] - shift,
        past_key_values=_past(contexts, longest),
        attention_mask=(positions >= shift).long(),
    )
    return torch.cat((torch.stack([c.last for c in contexts])[:, None], output.last_hidden_state), 1)


def _read(llm: FrozenLLM, ids: Tensor, positions: Tensor, **arguments: Any) -> Any:
    """The decoder's answer to text (B, S) at positions (S,) or (B, S), the same on every axis that a family has."""
    axes = llm.family.axes
    of_rows = positions.expand(ids.shape)
    place = of_rows if axes == 1 else of_rows.expand(axes, *ids.shape)
    inputs = llm.family.widen(llm.embed(ids))
    return llm.read(inputs, position_ids=place, use_cache=True, **arguments)


def _past(contexts: Sequence[PrefilledContext], longest: int) -> DynamicCache:
    layers, two, heads, _, width = contexts[0].values.shape
    values = contexts[0].last.new_zeros(layers, two, len(contexts), heads, longest, width)
    for row, context in enumerate(contexts):
        values[:, :, row, :, longest - context.length :] = context.values[:, :, :, : context.length]
    return DynamicCache([(layer[0], layer[1]) for layer in values])
