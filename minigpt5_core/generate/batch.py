"""The decoder over several stories at once: prefill, then one decode step after another, with a key/value cache.

Shape letters: A axes of a position, B batch, L llm width, V vokens, W width of what stands in the sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInputError
from ..llm.families.base import stack_positions
from ..llm.frozen import FrozenLLM
from .cache import StoryCache
from .prompt import Prompt, embed_prompt, position_keys, prompt_positions
from .row import RowState


class BatchDecoder:
    """Runs the decoder over rows of different length: each is padded behind, and the mask hides the padding for good.

    `newest` is each row's last state (B, L), which predicts its next token.
    """

    def __init__(self, llm: FrozenLLM, rows: int, cache: StoryCache | None) -> None:
        self.llm = llm
        self.cache = cache or StoryCache()
        if self.cache.values is None:
            self.cache.values = llm.begin(rows)
        self.prefix_length = self.cache.values.get_seq_length() - len(self.cache.keys)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=llm.device)
        self.next = [0] * rows  # the position of each row's next token
        self.newest: Tensor

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Feeds the prompts, less what the cache already holds; BadInputError for one longer than the context."""
        pieces = [embed_prompt(self.llm, prompt) for prompt in prompts]
        keys = [position_keys(prompt) for prompt in prompts]
        longest = max(len(piece) for piece in pieces)
        if longest > self.llm.context:
            raise BadInputError(
                f"The prompt is {longest} tokens long; this LLM reads at most {self.llm.context}. Shorten it."
            )
        shared = self.cache.reuse(keys[0]) if len(prompts) == 1 else 0
        known = self.prefix_length + shared
        self.mask = torch.ones(len(prompts), known, dtype=torch.long, device=self.llm.device)
        places = [prompt_positions(self.llm, prompt)[:, shared:] + self.prefix_length for prompt in prompts]
        hidden = self._forward([piece[shared:] for piece in pieces], [key[shared:] for key in keys], places)
        self.newest = torch.stack([hidden[row, len(piece) - shared - 1] for row, piece in enumerate(pieces)])

    def decode_step(self, rows: list[RowState], ids: list[list[int]]) -> None:
        """Feeds every row its ids, none, one or a whole voken block; the rows keep the states that predict vokens."""
        embedded = [
            self.llm.embed(torch.tensor([some], dtype=torch.long, device=self.llm.device))[0] for some in ids
        ]
        pieces = [self.llm.family.widen(piece) for piece in embedded]
        hidden = self._forward(pieces, ids, self._next_positions(ids))
        newest, opens = self.newest.clone(), self.llm.voken_ids[0]
        for index, (row, some) in enumerate(zip(rows, ids, strict=True)):
            if opens in some:
                states = torch.cat((self.newest[index : index + 1], hidden[index]))
                start = some.index(opens)
                row.states.append(states[start : start + len(self.llm.voken_ids)])
            if some:
                newest[index] = hidden[index, len(some) - 1]
        self.newest = newest

    def _next_positions(self, ids: list[list[int]]) -> list[Tensor]:
        """(A, row's length) positions of text that goes on from each row's end."""
        counted = [torch.arange(first, first + len(some)) for first, some in zip(self.next, ids, strict=True)]
        return [row.expand(self.llm.family.axes, -1) for row in counted]

    def _forward(self, pieces: list[Tensor], keys: list[list], positions: list[Tensor]) -> Tensor:
        """(row's length, W) pieces at (A, row's length) positions -> (B, longest, L) last-layer states."""
        lengths = torch.tensor([len(piece) for piece in pieces], device=self.llm.device)
        inputs = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        valid = (torch.arange(inputs.shape[1], device=self.llm.device) < lengths[:, None]).long()
        self.mask = torch.cat((self.mask, valid), 1)
        hidden = self.llm.read(
            inputs,
            attention_mask=None if len(pieces) == 1 else self.mask,
            position_ids=stack_positions(positions).to(self.llm.device),
            past_key_values=self.cache.values,
            use_cache=True,
        ).last_hidden_state
        self.next = [
            int(row.max()) + 1 if row.numel() else first
            for first, row in zip(self.next, positions, strict=True)
        ]
        if len(pieces) == 1:
            self.cache.keys.extend(keys[0])
        return hidden
