"""How the next token is chosen: settings, and the maths by transformers' logits processors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import BadInputError

Pictures = Literal["after_text", "when_asked", "first", "none"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, and when a picture comes.

    `pictures`: "after_text" writes text, then always one picture; "when_asked" leaves it to the model; "first" puts
    the picture before any text, as published; "none" forbids it. `temperature` 0 takes the likeliest token.
    `penalised_prefix` are ids that the repetition penalty counts besides the generated ones.
    `stray_vokens` suppresses no id at all, as published: a later voken may come alone and counts as a word.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    pictures: Pictures = "after_text"
    max_pictures: int = 1
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    penalised_prefix: tuple[int, ...] = ()
    stray_vokens: bool = False


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator in which all 64 bits of the seed count; torch's own on the CPU ignores the upper 32."""
    mixed = int(np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint32)[0])
    return torch.Generator(device).manual_seed(mixed)


def logits_processors(sampling: Sampling) -> LogitsProcessorList:
    """Repetition penalty, temperature, top-k and top-p, those that change anything."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def sample_token(
    logits: Tensor,
    history: Sequence[int],
    suppressed: list[int],
    processors: LogitsProcessorList,
    generator: torch.Generator | None,
) -> int:
    """The next token from `logits` (vocabulary,): never one of `suppressed`; without a generator the likeliest.

    `history` are the ids that the repetition penalty counts. BadInputError for logits that are no numbers.
    """
    ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
    suppress = SuppressTokensLogitsProcessor(suppressed, device=logits.device)
    # suppressed first, so that top-p and top-k never leave only tokens that may not come
    scores = processors(ids, suppress(ids, logits[None].float()))
    if not scores.max().isfinite():
        raise BadInputError(
            "The LLM answers with numbers that are none (NaN or infinite). A model that was trained in bfloat16 does "
            "so in float16: load it in bfloat16 or float32. Else weights are damaged: copy model and adapter again."
        )
    if generator is None:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))
