"""The voken states of stories whose words are known: what the LLM says in its vokens where each picture belongs.

The states are those of a story that the LLM tells itself: the same prompts, with the voken blocks of earlier scenes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..llm.families.base import stack_positions
from ..llm.frozen import FrozenLLM
from ..vokens import block_starts, gather_voken_states
from .captioned import CaptionedStory
from .prompts import NEXT, Turn, chat_text

READ_AT_ONCE = 1024  # tokens in one forward, padding counted


def turns_of(story: CaptionedStory) -> list[Turn]:
    """The story as the LLM reads it. The first scene's request is its own text, where none is given."""
    return [
        Turn(scene.request or (NEXT if index else scene.text), scene.text, picture=bool(scene.caption))
        for index, scene in enumerate(story)
    ]


@torch.no_grad()
def read_voken_states(llm: FrozenLLM, stories: Sequence[CaptionedStory]) -> Iterator[tuple[int, Tensor]]:
    """(which story, (k, V, L) states on the CPU of its k scenes with a caption), the shortest stories first.

    Of a story longer than the LLM's context only the scenes that fit are read; k is smaller then.
    """
    encoded = sorted(((_ids(llm, story), index) for index, story in enumerate(stories)), key=_length)
    waiting: list[tuple[list[int], int]] = []
    for ids, index in encoded:
        if waiting and (len(waiting) + 1) * len(ids) > READ_AT_ONCE:
            yield from _read(llm, waiting)
            waiting = []
        waiting.append((ids, index))
    if waiting:
        yield from _read(llm, waiting)


def _length(pair: tuple[list[int], int]) -> int:
    return len(pair[0])


def _ids(llm: FrozenLLM, story: CaptionedStory) -> list[int]:
    turns = turns_of(story)
    while turns:
        ids = llm.encode(chat_text(llm, turns))
        if len(ids) <= llm.context:
            return ids
        turns = turns[:-1]
    return []


def _read(llm: FrozenLLM, batch: list[tuple[list[int], int]]) -> Iterator[tuple[int, Tensor]]:
    """One forward over sequences padded behind: attention is causal, so padding reaches nothing that counts."""
    count = len(llm.voken_ids)
    blocks = [
        (row, start) for row, (ids, _) in enumerate(batch) for start in block_starts(ids, llm.voken_ids)
    ]
    if not blocks:
        yield from ((index, torch.empty(0, count, llm.width)) for _, index in batch)
        return
    pad = llm.tokenizer.pad_token_id or 0
    rows = [torch.tensor(ids, dtype=torch.long) for ids, _ in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(llm.device)
    known = llm.begin(len(batch))
    hidden = llm.read(
        llm.family.widen(llm.embed(ids)),
        past_key_values=known,
        **_positions(llm, rows, known.get_seq_length()),
    ).last_hidden_state
    states = gather_voken_states(hidden, blocks, count).float().cpu()
    for row, (_, index) in enumerate(batch):
        yield index, states[[at for at, (own, _) in enumerate(blocks) if own == row]]


def _positions(llm: FrozenLLM, rows: Sequence[Tensor], first: int) -> dict[str, Tensor]:
    """Position ids from `first` on, where a decoder cannot count them by itself."""
    if llm.family.axes == 1:
        return {}
    return {
        "position_ids": stack_positions([llm.family.positions(len(row), []) + first for row in rows]).to(
            llm.device
        )
    }
