"""Our decode loop: text token by token, a whole voken block in one forward (arXiv 2310.02239, section 3.2).

The last-layer states are kept only where a voken is predicted. Several stories run in one batch: every step feeds
each row what it needs (one token, or a block), and the attention mask hides what is padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import BadInputError
from .families.base import placed, stack_positions
from .llm import FrozenLLM

Pictures = Literal["after_text", "when_asked", "first", "none"]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens, and when a picture comes.

    `pictures`: "after_text" writes text, then always one picture; "when_asked" leaves it to the model; "first" puts
    the picture before any text, as published; "none" forbids it. `temperature` 0 takes the likeliest token.
    `penalised_prefix` are ids the repetition penalty counts besides the generated ones.
    `stray_vokens` forbids no id at all, as published: a later voken may come alone and counts as a word.
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


@dataclass(frozen=True)
class Prompt:
    """Token ids; each `image_id` among them is one picture's slot, replaced by that picture's (K, W) tokens."""

    ids: list[int]
    images: list[Tensor] = field(default_factory=list)
    image_id: int | None = None

    @property
    def length(self) -> int:
        """How many positions it takes, a picture counted with all its vectors."""
        return len(self.ids) + sum(len(image) - 1 for image in self.images)

    @property
    def spread(self) -> list[int]:
        """The ids with each picture's slot repeated for all of its tokens."""
        images = iter(self.images)
        return [
            token
            for slot in self.ids
            for token in ([slot] * len(next(images)) if slot == self.image_id else [slot])
        ]


@dataclass
class Reply:
    """One answer. `ids`: what was generated, one [IMG0] standing for each block; `voken_states`: (k, V, L).

    `texts` are what stands before each of the k pictures, and what comes after the last one.
    """

    ids: list[int]
    text: str
    voken_states: Tensor
    stopped: str
    texts: list[str] = field(default_factory=list)

    def scenes(self, most: int) -> list[tuple[str, Tensor | None]]:
        """Up to `most` pictures (V, L), each with the text before it; the last one also has all that is left."""
        if len(self.voken_states) < 2:
            return [(self.text, self.voken_states[0] if len(self.voken_states) else None)]
        states = self.voken_states[:most]
        early, late = self.texts[: len(states) - 1], self.texts[len(states) - 1 :]
        return list(zip((*early, " ".join(filter(None, late))), states, strict=True))


@dataclass
class StoryCache:
    """Keys and values of a story so far, kept from turn to turn (one story)."""

    keys: list[int | tuple] = field(default_factory=list)
    values: DynamicCache | None = None

    def reuse(self, keys: list[int | tuple]) -> int:
        """Crops to the longest common beginning, leaving at least one position to compute; returns its length."""
        shared = 0
        for mine, theirs in zip(self.keys, keys[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        if self.values is not None and shared < len(self.keys):
            self.values.crop(shared - len(self.keys))  # negative: how many to take off the end
            self.keys = self.keys[:shared]
        return shared


class _Row:
    """One story's progress through the loop. Once `stopped` is set, what was chosen last is all there is to feed."""

    def __init__(self, llm: FrozenLLM, sampling: Sampling, seed: int) -> None:
        self.llm, self.sampling = llm, sampling
        self.generator = seeded_generator(seed, llm.device)
        self.ids: list[int] = []
        self.states: list[Tensor] = []
        self.stopped = ""
        self.warpers = _warpers(sampling)
        end = llm.tokenizer.eos_token_id
        self.stop_ids = set(sampling.stop_ids) or ({end} if end is not None else set())

    def choose(self, logits: Tensor) -> list[int]:
        """The ids to feed next: a token, a block, a last token with a block, or nothing."""
        if self.sampling.pictures == "first" and not self.ids:
            return self._block()
        if len(self.ids) >= self.sampling.max_new_tokens:
            return self._end("length")
        token = self._sample(logits)
        if token == self.llm.voken_ids[0]:
            return self._block()
        if token in self.stop_ids:
            return self._end("end")
        self.ids.append(token)
        return self._end("stop string", [token]) if self._in_stop_string() else [token]

    def _block(self) -> list[int]:
        self.ids.append(self.llm.voken_ids[0])
        if self.sampling.pictures == "after_text" and len(self.states) + 1 >= self.sampling.max_pictures:
            self.stopped = "picture"
        return self.llm.voken_ids

    def _end(self, reason: str, last: list[int] | None = None) -> list[int]:
        """Ends the reply; with "after_text" a reply without a picture gets one first."""
        owed = self._block() if self.sampling.pictures == "after_text" and not self.states else []
        self.stopped = reason
        return (last or []) + owed

    def _sample(self, logits: Tensor) -> int:
        history = torch.tensor(
            [[*self.sampling.penalised_prefix, *self.ids]], dtype=torch.long, device=logits.device
        )
        forbid = SuppressTokensLogitsProcessor(self._forbidden(), device=logits.device)
        # first, so that top-p and top-k never leave only tokens that may not come
        scores = self.warpers(history, forbid(history, logits[None].float()))
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generator))

    def _forbidden(self) -> list[int]:
        """What may not come now: never a later voken by itself, and [IMG0] only where a picture may stand."""
        if self.sampling.stray_vokens:
            return []
        if self.sampling.pictures == "after_text" and not self.ids:
            return [*self.llm.voken_ids, *self.stop_ids]
        full = len(self.states) >= self.sampling.max_pictures
        return self.llm.voken_ids if full or self.sampling.pictures == "none" else self.llm.voken_ids[1:]

    def _in_stop_string(self) -> bool:
        tail = self.llm.tokenizer.decode(self.ids[-16:]) if self.sampling.stop_strings else ""
        return any(stop in tail for stop in self.sampling.stop_strings)

    def reply(self) -> Reply:
        """What came out."""
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


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator in which all 64 bits of the seed count; torch's own on the CPU ignores the upper 32."""
    mixed = int(np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint32)[0])
    return torch.Generator(device).manual_seed(mixed)


@torch.no_grad()
def generate(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    cache: StoryCache | None = None,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[Reply]:
    """One reply for each prompt, the same as each would get alone; seed i (64 bits) draws for prompt i.

    `cache` (one prompt only) keeps the story's keys and values from turn to turn. `on_token(row)` is called for every
    step of a row; a true answer stops everything, and the replies so far are returned with `stopped` = "cancelled".
    """
    if len(seeds) != len(prompts) or (cache is not None and len(prompts) != 1):
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds (got {len(seeds)}); a cache serves one prompt."
        )
    rows = [_Row(llm, sampling, seed) for seed in seeds]
    feeder = _Feeder(llm, len(rows), cache)
    last = feeder.start(prompts)
    while active := [row for row in rows if not row.stopped]:
        logits = llm.logits(last)
        feeds = [row.choose(logits[index]) if not row.stopped else [] for index, row in enumerate(rows)]
        if any(on_token and on_token(rows.index(row)) for row in active):
            for row in active:
                row.stopped = "cancelled"
            break
        if any(feeds):
            last = _advance(llm, feeder, rows, feeds, last)
    return [row.reply() for row in rows]


def _advance(
    llm: FrozenLLM, feeder: "_Feeder", rows: list[_Row], feeds: list[list[int]], last: Tensor
) -> Tensor:
    """Feeds every row its ids and keeps the states that predict vokens; returns each row's newest state (B, L)."""
    embedded = [llm.embed(torch.tensor([ids], dtype=torch.long, device=llm.device))[0] for ids in feeds]
    pieces = [llm.family.widen(piece) for piece in embedded]
    hidden = feeder.feed(pieces, feeds, feeder.next_positions(feeds))
    newest = last.clone()
    for index, (row, ids) in enumerate(zip(rows, feeds, strict=True)):
        if llm.voken_ids[0] in ids:
            states = torch.cat((last[index : index + 1], hidden[index]))
            start = ids.index(llm.voken_ids[0])
            row.states.append(states[start : start + len(llm.voken_ids)])
        if ids:
            newest[index] = hidden[index, len(ids) - 1]
    return newest


class _Feeder:
    """Runs the decoder over ragged pieces: row i's piece is padded behind, and the mask hides the padding for good."""

    def __init__(self, llm: FrozenLLM, rows: int, cache: StoryCache | None) -> None:
        self.llm = llm
        self.cache = cache or StoryCache()
        if self.cache.values is None:
            self.cache.values = llm.begin(rows)
        self.prefixed = self.cache.values.get_seq_length() - len(self.cache.keys)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=llm.device)
        self.next = [0] * rows  # the position of each row's next token

    def start(self, prompts: Sequence[Prompt]) -> Tensor:
        """Feeds the prompts, less what the cache already holds; each row's last state, (B, L)."""
        pieces = [embed_prompt(self.llm, prompt) for prompt in prompts]
        keys = [position_keys(prompt) for prompt in prompts]
        longest = max(len(piece) for piece in pieces)
        if longest > self.llm.context:
            raise BadInputError(
                f"The prompt is {longest} tokens long; this LLM reads at most {self.llm.context}. Shorten it."
            )
        shared = self.cache.reuse(keys[0]) if len(prompts) == 1 else 0
        known = self.prefixed + shared
        self.mask = torch.ones(len(prompts), known, dtype=torch.long, device=self.llm.device)
        places = [_positions(self.llm, prompt)[:, shared:] + self.prefixed for prompt in prompts]
        hidden = self.feed([piece[shared:] for piece in pieces], [key[shared:] for key in keys], places)
        return torch.stack([hidden[row, len(piece) - shared - 1] for row, piece in enumerate(pieces)])

    def next_positions(self, feeds: list[list[int]]) -> list[Tensor]:
        """(A, row's length) positions of text that goes on from each row's end."""
        counted = [torch.arange(first, first + len(ids)) for first, ids in zip(self.next, feeds, strict=True)]
        return [row.expand(self.llm.family.axes, -1) for row in counted]

    def feed(self, pieces: list[Tensor], keys: list[list], positions: list[Tensor]) -> Tensor:
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


def _positions(llm: FrozenLLM, prompt: Prompt) -> Tensor:
    """(A, positions) of a prompt without what stands in front of it."""
    ids = prompt.spread
    return llm.family.positions(len(ids), list(placed(ids, prompt.images, prompt.image_id)))


def embed_prompt(llm: FrozenLLM, prompt: Prompt) -> Tensor:
    """(positions, W): the embedded ids, with pictures' tokens in their slots."""
    words = [0 if token == prompt.image_id else token for token in prompt.ids]  # a slot has no embedding
    embedded = llm.family.widen(llm.embed(torch.tensor([words], device=llm.device))[0])
    images = iter(prompt.images)
    pieces = [
        next(images).to(embedded)
        if prompt.image_id is not None and token == prompt.image_id
        else embedded[index : index + 1]
        for index, token in enumerate(prompt.ids)
    ]
    return torch.cat(pieces)


def position_keys(prompt: Prompt) -> list:
    """What stands at each position, for comparing prompts: a token id, or a picture's content and row."""
    images = iter(prompt.images)
    keys: list = []
    for token in prompt.ids:
        if prompt.image_id is not None and token == prompt.image_id:
            image = next(images)
            digest = hash(image.detach().float().cpu().numpy().tobytes())
            keys.extend((digest, row) for row in range(len(image)))
        else:
            keys.append(token)
    return keys


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
