"""Mappers: the LLM's hidden states at the vokens become a diffusion model's conditioning (arXiv 2310.02239).

Shape letters: B batch, V vokens, L llm width, H hidden width, T conditioning tokens, C conditioning width,
P pooled width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..config import MapperConfig
from ..errors import BadInputError
from .spaces import Conditioning, Space


class Mapper(nn.Module):
    """Voken states (B, V, L) -> Conditioning: tokens (B, T, C), pooled (B, P) where the space has one."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self._negative: tuple[tuple[int, ...], Conditioning] | None = None

    def forward(self, states: torch.Tensor) -> Conditioning:
        """`states`: (B, V, L), in any dtype. Raises BadInputError for states of another shape."""
        expected = (self.config.vokens, self.config.llm_width)
        if states.ndim != 3 or states.shape[1:] != expected:
            raise BadInputError(
                f"Voken states of shape {tuple(states.shape)}, but this mapper takes "
                f"(batch, {expected[0]} vokens, {expected[1]} wide). "
                "Use the LLM and the number of vokens the mapper was trained with."
            )
        return self.map(states.to(next(self.parameters()).dtype))

    def map(self, states: torch.Tensor) -> Conditioning:
        """`forward` for states that have the right shape and dtype; each kind has its own."""
        raise NotImplementedError

    def negative(self) -> Conditioning:
        """The answer to zero voken states, batch 1: the unconditional side of classifier-free guidance.

        Carries no gradient. Computed once; again only after the weights changed.
        """
        weights = _fingerprint(self)
        if self._negative is None or self._negative[0] != weights:
            # outside inference mode, so that the cached tensors may be used anywhere later
            with torch.inference_mode(False), torch.no_grad():
                reference = next(self.parameters())
                zeros = reference.new_zeros(1, self.config.vokens, self.config.llm_width)
                self._negative = weights, self(zeros)
        return self._negative[1]


class ReferenceMapper(Mapper):
    """The published mapper: a two-layer projection, then an encoder-decoder over T learned queries.

    No positions and no masks: the order of the vokens reaches it only through the LLM's states. Without a
    pooled head its parameters are the published `fc`, `llm_to_t2i_mapping` and `t2i_decoder_prompt`.
    """

    def __init__(self, config: MapperConfig) -> None:
        super().__init__(config)
        if config.hidden != config.width:
            raise BadInputError(
                f"The reference mapper works in the conditioning width {config.width}, found hidden "
                f"{config.hidden}. Set hidden = width, or use the compact mapper."
            )
        width = config.width
        self.fc = nn.Sequential(nn.Linear(config.llm_width, width), nn.GELU(), nn.Linear(width, width))
        self.transformer = _encoder_decoder(config, "relu")
        self.queries = nn.Parameter(torch.randn(1, config.tokens, width))
        self.pooled_head = _pooled_head(config)

    def map(self, states: torch.Tensor) -> Conditioning:
        features = self.fc(states)  # (B, V, C)
        tokens = self.transformer(features, self.queries.expand(len(states), -1, -1))
        return Conditioning(tokens, _pool(self.pooled_head, features))


class StandardisedMapper(Mapper):
    """What our own kinds share: how they read the states, and the scale of their output.

    The last layer of a new one has mean 0 and standard deviation near 1 in every dimension; `target_mean` and
    `target_std` (T, C) bring that to the text encoder's scale, so that it can be trained on the standardised target.
    `count` is how many of the V states are read.
    """

    target_mean: torch.Tensor
    target_std: torch.Tensor

    def __init__(self, config: MapperConfig, count: int) -> None:
        super().__init__(config)
        hidden = config.hidden
        # the LLM's final norm leaves a few dimensions hundreds of times larger than the others
        self.input = nn.Sequential(nn.LayerNorm(config.llm_width), nn.Linear(config.llm_width, hidden))
        self.positions = nn.Parameter(torch.randn(1, count, hidden) / hidden**0.5)
        self.queries = nn.Parameter(torch.randn(1, config.tokens, hidden))
        self.output = nn.Linear(hidden, config.width)
        nn.init.normal_(
            self.output.weight, std=hidden**-0.5
        )  # standard deviation 1 after the final LayerNorm
        nn.init.zeros_(self.output.bias)
        self.pooled_head = _pooled_head(config)
        self.register_buffer("target_mean", torch.zeros(config.tokens, config.width))
        self.register_buffer("target_std", torch.ones(config.tokens, config.width))

    def answer(self, hidden: torch.Tensor, memory: torch.Tensor) -> Conditioning:
        """(B, T, H), and (B, count, H) for the pooled vector -> conditioning in the text encoder's scale."""
        tokens = self.output(hidden) * self.target_std + self.target_mean
        return Conditioning(tokens, _pool(self.pooled_head, memory))


class CompactMapper(StandardisedMapper):
    """Our own small mapper: self-attention over the voken states, then T learned queries cross-attend to them."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__(config, config.vokens)
        self.transformer = _encoder_decoder(config, "gelu")

    def map(self, states: torch.Tensor) -> Conditioning:
        memory = self.transformer.encoder(self.input(states) + self.positions)  # (B, V, H)
        queries = self.queries.expand(len(states), -1, -1)
        return self.answer(self.transformer.decoder(queries, memory), memory)


class ConnectorMapper(StandardisedMapper):
    """Takes voken rows for learned queries, after the idea of MetaQuery (arXiv 2504.06256) and OpenUni (2505.23661).

    A query's result is the state at its own position, so the first of the V states, which is that before the block and
    predicts [IMG0], is left out; the others are those at [IMG0] .. [IMG(V-2)], V - 1 queries. One bidirectional encoder
    runs over them and T learned slots, and the slots are the result.
    """

    def __init__(self, config: MapperConfig) -> None:
        if config.vokens < 2:
            raise BadInputError("A connector needs 2 vokens or more, one more than it has queries; found 1.")
        super().__init__(config, config.vokens - 1)
        self.transformer = _encoder(config, "gelu")

    def map(self, states: torch.Tensor) -> Conditioning:
        queries = self.input(states[:, 1:]) + self.positions  # (B, V - 1, H)
        slots = self.queries.expand(len(states), -1, -1)
        read = self.transformer(torch.cat((queries, slots), 1))
        count = queries.shape[1]
        return self.answer(read[:, count:], read[:, :count])


MAPPERS: dict[str, type[Mapper]] = {
    "reference": ReferenceMapper, "compact": CompactMapper, "connector": ConnectorMapper,
}  # fmt: skip


def build_mapper(config: MapperConfig) -> Mapper:
    """A fresh mapper of the kind the config names; raises BadInputError for an unknown kind."""
    if config.kind not in MAPPERS:
        raise BadInputError(
            f"Unknown mapper kind {config.kind!r}. Known kinds: {', '.join(sorted(MAPPERS))}."
        )
    return MAPPERS[config.kind](config)


def reference_config(space: Space, llm_width: int, vokens: int = 8) -> MapperConfig:
    """The published sizes at the width of `space`: 4 + 4 layers, 8 heads, feed-forward 4 times the width."""
    return MapperConfig(
        kind="reference",
        vokens=vokens,
        llm_width=llm_width,
        tokens=space.tokens,
        width=space.width,
        pooled_width=space.pooled_width,
        hidden=space.width,
        heads=8,
        layers=4,
        feed_forward=4 * space.width,
    )


def compact_config(space: Space, llm_width: int, vokens: int = 8) -> MapperConfig:
    """Our own sizes: 2 + 2 layers of width 224; 2.2 M parameters from a 576-wide LLM to the storybook."""
    return MapperConfig(
        kind="compact",
        vokens=vokens,
        llm_width=llm_width,
        tokens=space.tokens,
        width=space.width,
        pooled_width=space.pooled_width,
        hidden=224,
        heads=7,
        layers=2,
        feed_forward=448,
    )


def connector_config(space: Space, llm_width: int, vokens: int = 9) -> MapperConfig:
    """The compact mapper's width and nearly its size: 5 layers over 8 queries, 2.2 M parameters for the storybook."""
    config = compact_config(space, llm_width, vokens)
    return replace(config, kind="connector", layers=5)


def _encoder(config: MapperConfig, activation: str) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(*_shape(config, activation), batch_first=True, norm_first=True)
    # without nested tensors, which norm-first never uses and torch warns about
    return nn.TransformerEncoder(
        layer, config.layers, nn.LayerNorm(config.hidden), enable_nested_tensor=False
    )


def _encoder_decoder(config: MapperConfig, activation: str) -> nn.Transformer:
    layer = nn.TransformerDecoderLayer(*_shape(config, activation), batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(config.hidden))
    return nn.Transformer(
        config.hidden,
        config.heads,
        custom_encoder=_encoder(config, activation),
        custom_decoder=decoder,
        batch_first=True,
    )


def _shape(config: MapperConfig, activation: str) -> tuple[int, int, int, float, str]:
    return config.hidden, config.heads, config.feed_forward, 0.0, activation


def _pooled_head(config: MapperConfig) -> nn.Linear | None:
    return nn.Linear(config.hidden, config.pooled_width) if config.pooled_width else None


def _pool(head: nn.Linear | None, states: torch.Tensor) -> torch.Tensor | None:
    return None if head is None else head(states.mean(dim=1))


def _fingerprint(module: nn.Module) -> tuple[int, ...]:
    """Changes whenever a weight is trained in place, loaded, moved or cast."""
    marks: list[int] = []
    for tensor in module.state_dict(keep_vars=True).values():
        marks += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tuple(marks)
