"""Our decode loop: text token by token, a whole voken block in one forward (arXiv 2310.02239, section 3.2).

The last-layer states are kept only where a voken is predicted. Several stories run in one batch: every step feeds
each row what it needs (one token, or a block), and the attention mask hides what is padding.
"""

from collections.abc import Callable, Sequence

import torch

from ..llm.frozen import FrozenLLM
from .batch import BatchDecoder
from .cache import StoryCache
from .prompt import Prompt
from .row import Reply, RowState
from .sampling import Sampling


@torch.no_grad()
def generate(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    cache: StoryCache | None = None,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[Reply]:
    """One reply for each prompt, the same as each would get alone; prompt i is sampled with seed i (64 bits).

    `cache` (one prompt only) keeps the story's keys and values from turn to turn. `on_token(row)` is called for every
    step of a row; a true answer stops everything, and the replies so far are returned with `stopped` = "cancelled".
    A reply ends with the LLM's context, whatever `sampling` allows. Raises BadInputError for a longer prompt.
    """
    if len(seeds) != len(prompts) or (cache is not None and len(prompts) != 1):
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds (got {len(seeds)}); a cache serves one prompt."
        )
    # 1. Prefill: the prompts' keys and values, and the state that predicts each row's first token.
    context = llm.context
    rooms = [context - prompt.length for prompt in prompts]
    rows = [RowState(llm, sampling, seed, room) for seed, room in zip(seeds, rooms, strict=True)]
    decoder = BatchDecoder(llm, len(rows), cache)
    decoder.prefill(prompts)
    while active := [row for row in rows if not row.stopped]:
        # 2. Sample: what each row that goes on is to be fed, a token or a voken block.
        logits = llm.logits(decoder.newest)
        ids = [row.next_ids(logits[index]) if not row.stopped else [] for index, row in enumerate(rows)]
        # 3. Tell the caller, who may cancel.
        if any(on_token and on_token(rows.index(row)) for row in active):
            for row in active:
                row.stopped = "cancelled"
            break
        # 4. Decode step: one forward over what was sampled.
        if any(ids):
            decoder.decode_step(rows, ids)
    return [row.reply() for row in rows]
