"""A mapper fitted to what a text encoder answers, from voken states and captions alone: no picture, no diffusion model.

    targets = Targets(empty)              # the text encoder's answer to the empty text
    targets.add(answers)                  # to captions, batch by batch
    fitted = fit_mapper(states, targets)  # states[i] belong to the i-th answer

Shape letters: B batch, N scenes, M captions, V vokens, L llm width, T conditioning tokens, C conditioning width,
P pooled width.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..config import MapperConfig
from ..errors import BadInputError
from ..losses import Statistics, caption_loss, drop_states
from .diffusion_families import SPACES
from .mapper import Mapper, StandardisedMapper, build_mapper, compact_config
from .spaces import Conditioning, Space

IN_MEMORY = 1 << 30  # bytes of answers; more than that lie on the disk
SMALLEST = 1e-2  # spread of a dimension: one that hardly changes is not to drown the others
HALF = torch.float16


@dataclass(frozen=True)
class FitSettings:
    """How it learns: the rate rises over the `warmup` share of the steps and falls as a cosine; `dropout` is the share
    of the samples whose states are zeros and whose target is the empty text's, for classifier-free guidance."""

    steps: int = 3000
    batch: int = 16
    rate: float = 1e-3
    seed: int = 0
    warmup: float = 0.05
    dropout: float = 0.1


@dataclass(frozen=True, eq=False)
class Fitted:
    """The mapper, on the CPU and in eval mode, and the loss of every step that was made."""

    mapper: Mapper
    losses: list[float]


class Targets:
    """What the text encoder answers to M captions: tokens (M, T, C) and, where it has one, a pooled vector (M, P).

    Kept in half precision as differences from its answer to the empty text, which for CLIP are exactly 0 where every
    caption has the same; beyond `in_memory` bytes in a nameless file in `folder`, which goes with the object.
    """

    def __init__(self, empty: Conditioning, folder: Path | None = None, in_memory: int = IN_MEMORY) -> None:
        self.empty = Conditioning(
            _plain(empty.tokens[:1]), None if empty.pooled is None else _plain(empty.pooled[:1])
        )
        self.tokens, self.pooled = Statistics(SMALLEST), Statistics(SMALLEST)
        self.count = 0
        # closed with the object: a reader draws rows from it for as long as there is one
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(
            in_memory, dir=None if folder is None else str(folder)
        )

    @property
    def token_shape(self) -> tuple[int, int]:
        """(T, C)."""
        return self.empty.tokens.shape[1], self.empty.tokens.shape[2]

    @property
    def pooled_width(self) -> int | None:
        """P."""
        return None if self.empty.pooled is None else self.empty.pooled.shape[1]

    def __len__(self) -> int:
        """M."""
        return self.count

    def add(self, answer: Conditioning) -> None:
        """The answers to B more captions. OSError where the disk is full; BadInputError for another shape."""
        found = tuple(answer.tokens.shape[1:]), answer.pooled.shape[1] if answer.pooled is not None else None
        if found != (self.token_shape, self.pooled_width):
            raise BadInputError(
                f"An answer of shape {found[0]} with a pooled vector of {found[1]}, but that to the empty text has "
                f"{self.token_shape} and {self.pooled_width}. Use one text encoder for all."
            )
        self.tokens.add(answer.tokens.cpu())
        parts = [(_plain(answer.tokens) - self.empty.tokens).flatten(1)]
        if answer.pooled is not None and self.empty.pooled is not None:
            self.pooled.add(answer.pooled[:, None].cpu())
            parts.append(_plain(answer.pooled) - self.empty.pooled)
        largest = torch.finfo(HALF).max
        self._file.seek(0, 2)
        self._file.write(torch.cat(parts, 1).clamp(-largest, largest).to(HALF).numpy().tobytes())
        self.count += len(answer.tokens)

    def rows(self, which: Sequence[int]) -> Conditioning:
        """The answers to some of the captions, in float32."""
        tokens, width = self.token_shape
        flat = torch.stack([self._row(one) for one in which]).float()
        known, pooled = flat[:, : tokens * width], flat[:, tokens * width :]
        return Conditioning(
            known.view(-1, tokens, width) + self.empty.tokens,
            None if self.empty.pooled is None else pooled + self.empty.pooled,
        )

    def _row(self, number: int) -> Tensor:
        if not 0 <= number < self.count:
            raise IndexError(f"caption {number} of {self.count}")
        tokens, width = self.token_shape
        size = (tokens * width + (self.pooled_width or 0)) * HALF.itemsize
        self._file.seek(number * size)
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=HALF)


def space_of_answers(answer: Conditioning) -> Space:
    """The conditioning space of a text encoder that answers so: a known family's, or one with a name of its own.

    The families that take no pooled vector are known by their width alone, for their CLIP has one all the same.
    """
    (_, tokens, width), pooled = answer.tokens.shape, answer.pooled
    given = None if pooled is None else pooled.shape[1]
    known = [one for one in SPACES.values() if one.width == width]
    exact = [one for one in known if one.pooled_width and one.pooled_width == given]
    if found := exact or [one for one in known if one.pooled_width is None]:
        return replace(found[0], tokens=tokens)
    name = f"text_{width}" + (f"_{given}" if given else "")
    return Space(name, tokens, width, given, latent_channels=0)  # of which nothing is known


def fit_mapper(
    states: Tensor,
    targets: Targets,
    settings: FitSettings = FitSettings(),
    *,
    rows: Sequence[int] | None = None,
    start: Mapper | None = None,
    on_step: Callable[[int, float], bool] | None = None,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Fits a compact mapper, or a copy of `start`, to `targets`, by the standardised caption loss.

    `states` are (N, V, L) in any dtype; `rows` says which of the M targets belongs to each (without: the same number).
    `on_step(step, loss)` hears every step, counted from 1, and may end the fitting there by returning True: what was
    learned is kept. The same seed gives the same mapper. BadInputError where the two do not fit, or the loss is no
    number.
    """
    rows = list(range(len(targets)) if rows is None else rows)
    _check(states, targets, rows, settings)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        mapper = _new_mapper(states, targets) if start is None else _copy(start, states, targets)
    mapper.to(device).train()
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _share_of_rate(done, settings))
    loss_of = _CaptionLoss(mapper, targets, settings.dropout, device)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    for which in _batches(len(states), settings, generator):
        loss = loss_of(states[which], [rows[one] for one in which], generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mapper.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not torch.isfinite(norm):
            raise BadInputError(
                f"The loss is {losses[-1]:g} at step {len(losses)}. Set a lower learning rate than "
                f"{settings.rate:g}."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if on_step is not None and on_step(len(losses), losses[-1]):
            break
    return Fitted(mapper.cpu().eval().requires_grad_(False), losses)


class _CaptionLoss:
    """The distance of the mapper's answers from the targets, tokens and pooled vector counted alike."""

    def __init__(self, mapper: Mapper, targets: Targets, dropout: float, device: torch.device) -> None:
        self.mapper, self.targets, self.dropout, self.device = mapper, targets, dropout, device
        self.std = targets.tokens.std.to(device)
        self.pooled_std = None if targets.pooled_width is None else targets.pooled.std.to(device)

    def __call__(self, states: Tensor, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        kept, dropped = drop_states(states.float(), self.dropout, generator)
        wanted = self.targets.rows(rows)
        empty = self.targets.empty
        tokens = torch.where(dropped[:, None, None], empty.tokens, wanted.tokens).to(self.device)
        pooled = None
        if wanted.pooled is not None and empty.pooled is not None:
            pooled = torch.where(dropped[:, None], empty.pooled, wanted.pooled).to(self.device)
        answer = self.mapper(kept.to(self.device))
        return answer_loss(answer, Conditioning(tokens, pooled), self.std, self.pooled_std)


def answer_loss(
    answer: Conditioning, wanted: Conditioning, std: Tensor | None = None, pooled_std: Tensor | None = None
) -> Tensor:
    """The caption loss of tokens (B, T, C), and where both have one that of the pooled vector (B, P), counted alike.

    In units of `std` (T, C) and `pooled_std` (1, P) where they are given.
    """
    loss = caption_loss(answer.tokens, wanted.tokens, std)
    if answer.pooled is None or wanted.pooled is None:
        return loss
    return loss + caption_loss(answer.pooled[:, None], wanted.pooled[:, None], pooled_std)


def _check(states: Tensor, targets: Targets, rows: Sequence[int], settings: FitSettings) -> None:
    for name in ("steps", "batch"):
        if getattr(settings, name) < 1:
            raise BadInputError(f"{name} is {getattr(settings, name)}; it must be 1 or more.")
    if states.ndim != 3 or not len(states):
        raise BadInputError(f"Voken states of shape {tuple(states.shape)}, expected (scenes, vokens, width).")
    if len(rows) != len(states) or not all(0 <= one < len(targets) for one in rows):
        raise BadInputError(f"{len(states)} voken states for {len(rows)} rows of {len(targets)} targets.")


def _new_mapper(states: Tensor, targets: Targets) -> Mapper:
    (tokens, width), pooled = targets.token_shape, targets.pooled_width
    config = compact_config(Space("", tokens, width, pooled), states.shape[2], states.shape[1])
    mapper = build_mapper(config)
    _scale(mapper, targets)
    head = mapper.pooled_head if isinstance(mapper, StandardisedMapper) else None
    if head is not None:
        with torch.no_grad():
            head.bias.copy_(targets.pooled.mean[0])
    return mapper


def check_start(config: MapperConfig, vokens: int, llm_width: int, targets: Targets) -> None:
    """BadInputError unless a mapper can be fitted further, to these targets."""
    found = (config.vokens, config.llm_width, config.tokens, config.width, config.pooled_width)
    expected = (vokens, llm_width, *targets.token_shape, targets.pooled_width)
    if found != expected:
        names = ("vokens", "LLM width", "tokens", "width", "pooled width")
        wrong = [
            f"{name} {one} where {other} is needed"
            for name, one, other in zip(names, found, expected, strict=True)
            if one != other
        ]
        raise BadInputError(
            f"The earlier mapper is for another LLM or text encoder: {', '.join(wrong)}. Use one that was trained for "
            "these, or begin with none."
        )


def memory_of_fit(targets: Targets, settings: FitSettings) -> int:
    """Bytes that fitting a compact mapper takes, roughly: weights four times over, and a step's activations."""
    (tokens, width), pooled = targets.token_shape, targets.pooled_width
    config = compact_config(Space("", tokens, width, pooled), 4096)
    weights = config.hidden * (width + (pooled or 0) + 4096) + 20 * config.hidden**2 * config.layers
    activations = settings.batch * tokens * (60 * config.hidden * config.layers + 8 * width)
    return 4 * (4 * weights + activations + 4 * tokens * width)


def _copy(start: Mapper, states: Tensor, targets: Targets) -> Mapper:
    """A copy of another mapper, in the scale of these targets."""
    check_start(start.config, states.shape[1], states.shape[2], targets)
    mapper = build_mapper(start.config)  # not a deep copy: the other's tensors may be of inference mode
    with torch.no_grad():
        mapper.load_state_dict(start.state_dict(), strict=True)
    _scale(mapper, targets)
    return mapper


def _scale(mapper: Mapper, targets: Targets) -> None:
    """Lets a mapper of our own kinds answer in the text encoder's scale."""
    if isinstance(mapper, StandardisedMapper):
        mapper.target_mean.copy_(targets.tokens.mean)
        mapper.target_std.copy_(targets.tokens.std)


def _share_of_rate(done: int, settings: FitSettings) -> float:
    """Of the highest rate, after so many steps."""
    rising = int(settings.warmup * settings.steps)
    if done < rising:
        return (done + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (done - rising) / max(1, settings.steps - rising)))


def _batches(count: int, settings: FitSettings, generator: torch.Generator) -> Iterator[list[int]]:
    """`steps` batches: all scenes in an order of their own, then all in another."""
    waiting: list[int] = []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]


def _plain(tensor: Tensor) -> Any:
    """In float32 on the CPU, and usable in training though it may come from inference mode."""
    return tensor.detach().float().cpu().clone()
