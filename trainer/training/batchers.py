"""A step's examples as batches, and what a batch costs: whole sequences, or voken blocks behind prefilled contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from minigpt5_core.losses import voken_loss

from ..data.source import Example, Passage, PictureTarget, Shard, new_seed
from ..llm.prefill_cache import PrefillCache, PrefilledContext, block_states
from ..llm.sequences import TextBatch, batch_losses, story_sequence
from .loop import Batch, Losses
from .setup import Setup, step_rng

Item = TypeVar("Item")


class Batcher(Protocol):
    """What the training loop is fed with."""

    def batches(self, step: int, shard: Shard) -> list[Batch]:
        """A process's share of a step, in as many parts as the recipe accumulates."""

    def losses(self, inputs: Any) -> Losses:
        """The losses of one batch's inputs, each a mean over what the batch counts."""


def split(items: Sequence[Item], parts: int) -> list[list[Item]]:
    """Items dealt out to a number of parts."""
    return [list(items[part::parts]) for part in range(parts)]


class SequenceBatcher:
    """The LLM reads every example from its beginning: any source, any adapter."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def batches(self, step: int, shard: Shard) -> list[Batch]:
        """Of the source's next examples."""
        recipe, source = self.setup.recipe, self.setup.source
        examples = source.sample(recipe.optim.batch, step_rng(recipe.run.seed, step), shard)
        parts = {name: split(some, recipe.optim.accumulation) for name, some in examples.items()}
        uses = recipe.uses_diffusion_loss(step)
        return [
            self._batch({name: some[part] for name, some in parts.items()}, uses)
            for part in range(recipe.optim.accumulation)
        ]

    def _batch(self, examples: dict[str, list[Example]], uses_diffusion_loss: bool) -> Batch:
        llm = self.setup.llm
        sequences = {
            name: [story_sequence(llm, one.turns) for one in some] for name, some in examples.items()
        }
        targets = [target for some in examples.values() for one in some for target in one.targets]
        inputs = TextBatch(sequences, targets, uses_diffusion_loss)
        pictures = self.setup.picture_losses.counts(targets, uses_diffusion_loss)
        return Batch(inputs, inputs.counts() | pictures)

    def losses(self, inputs: TextBatch) -> Losses:
        """Text losses by name, and the pictures' losses."""
        return batch_losses(self.setup.llm, inputs, self.setup.picture_losses)


@dataclass(frozen=True)
class BlockBatch:
    """Contexts, and what the picture behind each should show."""

    contexts: list[PrefilledContext]
    targets: list[PictureTarget]
    uses_diffusion_loss: bool


class PrefilledBatcher:
    """Voken blocks alone, behind keys and values that were computed once: for an LLM of which only the rows learn."""

    def __init__(self, setup: Setup, passages: Sequence[Passage]) -> None:
        self.setup = setup
        self.cache = PrefillCache(setup.llm, passages, dtype=torch.float16)

    def batches(self, step: int, shard: Shard) -> list[Batch]:
        """Of contexts of about one length."""
        recipe = self.setup.recipe
        rng = step_rng(recipe.run.seed, step)
        contexts = self.cache.sample(recipe.optim.batch, rng)
        pairs = [(context, replace(context.target, seed=new_seed(rng))) for context in contexts]
        mine = [pair for index, pair in enumerate(pairs) if shard.has(index)]
        uses = recipe.uses_diffusion_loss(step)
        return [self._batch(part, uses) for part in split(mine, recipe.optim.accumulation)]

    def _batch(self, pairs: list[tuple[PrefilledContext, PictureTarget]], uses_diffusion_loss: bool) -> Batch:
        contexts, targets = [context for context, _ in pairs], [target for _, target in pairs]
        pictures = self.setup.picture_losses.counts(targets, uses_diffusion_loss)
        return Batch(BlockBatch(contexts, targets, uses_diffusion_loss), {"text": len(pairs)} | pictures)

    def losses(self, inputs: BlockBatch) -> Losses:
        """As `SequenceBatcher.losses`, the LLM run over the voken blocks alone."""
        if not inputs.contexts:
            return {}
        llm = self.setup.llm
        wanted = torch.full((len(inputs.contexts),), llm.voken_ids[0], device=llm.device)
        last: Tensor = torch.stack([context.last for context in inputs.contexts])
        text = voken_loss(llm.logits(last), wanted)
        states = block_states(llm, inputs.contexts)
        pictures = self.setup.picture_losses(states, inputs.targets, inputs.uses_diffusion_loss)
        return {"text": text} | pictures
