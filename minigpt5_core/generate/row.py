"""One story's part of a batch: what it has written so far, and what comes next."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..llm.frozen import FrozenLLM
from .sampling import Sampling, logits_processors, sample_token, seeded_generator

STOP_WINDOW = 16  # tokens at the end of a reply in which a stop string is looked for


@dataclass
class Reply:
    """One answer. `ids`: what was generated, one [IMG0] standing for each voken block; `voken_states`: (k, V, L).

    `texts` are what stands before each of the k pictures, and what comes after the last one. `stopped` is why it
    ended: "end", "length", "picture", "stop string" or "cancelled".
    """

    ids: list[int]
    text: str
    voken_states: Tensor
    stopped: str
    texts: list[str] = field(default_factory=list)

    def scenes(self, most: int) -> list[tuple[str, Tensor | None]]:
        """Up to `most` pictures (V, L), each with the text before it; the last one also has all the text after it."""
        if len(self.voken_states) < 2:
            return [(self.text, self.voken_states[0] if len(self.voken_states) else None)]
        states = self.voken_states[:most]
        early, late = self.texts[: len(states) - 1], self.texts[len(states) - 1 :]
        return list(zip((*early, " ".join(filter(None, late))), states, strict=True))


class RowState:
    """One story's progress through the decode loop. Once `stopped` is set, the ids chosen last are the last to feed.

    `states` are those that predict the vokens of each block so far, (V, L) each. `room` is how many positions there
    are behind the prompt.
    """

    def __init__(self, llm: FrozenLLM, sampling: Sampling, seed: int, room: int) -> None:
        self.llm, self.sampling, self.room = llm, sampling, room
        self.generator = seeded_generator(seed, llm.device)
        self.ids: list[int] = []
        self.states: list[Tensor] = []
        self.stopped = ""
        self.processors = logits_processors(sampling)
        self.stop_ids = set(sampling.stop_ids) or llm.stop_ids

    def next_ids(self, logits: Tensor) -> list[int]:
        """The ids to feed next, by logits (vocabulary,): a token, a block, a last token with a block, or nothing."""
        if self.sampling.pictures == "first" and not self.ids:
            return self._voken_block()
        if len(self.ids) >= self.sampling.max_new_tokens or not self._fits(1):
            return self._stop("length")
        token = self._sample(logits)
        if token == self.llm.voken_ids[0]:
            return self._voken_block()
        if token in self.stop_ids:
            return self._stop("end")
        self.ids.append(token)
        return self._stop("stop string", [token]) if self._in_stop_string() else [token]

    def _fits(self, more: int) -> bool:
        """Whether there is room for so many tokens and a voken block behind them."""
        count, blocks = len(self.llm.voken_ids), self.ids.count(self.llm.voken_ids[0])
        return len(self.ids) + blocks * (count - 1) + more + count <= self.room

    def _voken_block(self) -> list[int]:
        self.ids.append(self.llm.voken_ids[0])
        if self.sampling.pictures == "after_text" and len(self.states) + 1 >= self.sampling.max_pictures:
            self.stopped = "picture"
        return self.llm.voken_ids

    def _stop(self, reason: str, last: list[int] | None = None) -> list[int]:
        """Ends the reply; with "after_text" a reply without a picture gets one first."""
        owes = self.sampling.pictures == "after_text" and not self.states and self._fits(0)
        owed = self._voken_block() if owes else []
        self.stopped = reason
        return (last or []) + owed

    def _sample(self, logits: Tensor) -> int:
        history = [*self.sampling.penalised_prefix, *self.ids]
        generator = None if self.sampling.temperature == 0 else self.generator
        return sample_token(logits, history, self._suppressed(), self.processors, generator)

    def _suppressed(self) -> list[int]:
        """What may not come now: never a later voken by itself, and [IMG0] only where a picture may stand."""
        if self.sampling.stray_vokens:
            return []
        if self.sampling.pictures == "after_text" and not self.ids:
            return [*self.llm.voken_ids, *self.stop_ids]
        full = len(self.states) >= self.sampling.max_pictures
        return self.llm.voken_ids if full or self.sampling.pictures == "none" else self.llm.voken_ids[1:]

    def _in_stop_string(self) -> bool:
        tail = self.llm.tokenizer.decode(self.ids[-STOP_WINDOW:]) if self.sampling.stop_strings else ""
        return any(stop in tail for stop in self.sampling.stop_strings)

    def reply(self) -> Reply:
        """What was generated."""
        count, width = len(self.llm.voken_ids), self.llm.width
        states = (
            torch.stack(self.states) if self.states else torch.zeros(0, count, width, device=self.llm.device)
        )
        return Reply(self.ids, self._text(self.ids), states, self.stopped, self._texts())

    def _texts(self) -> list[str]:
        """The texts between the pictures."""
        opens = self.llm.voken_ids[0]
        blocks = [index for index, token in enumerate(self.ids) if token == opens]
        edges = zip([0, *(index + 1 for index in blocks)], [*blocks, len(self.ids)], strict=True)
        return [self._text(self.ids[start:end]) for start, end in edges]

    def _text(self, ids: list[int]) -> str:
        text = self.llm.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.sampling.stop_strings:
            text = text.split(stop)[0]
        return text.strip()
