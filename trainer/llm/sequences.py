"""A story as one sequence for the LLM: ids, labels, voken blocks; and one forward over several of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.llm.families.base import placed, stack_positions
from minigpt5_core.losses import IGNORED, voken_loss
from minigpt5_core.story.prompts import Turn, chat_prompt
from minigpt5_core.vokens import block_starts, gather_voken_states

from ..data.source import PictureTarget
from .fsdp import is_sharded


@dataclass(frozen=True)
class StorySequence:
    """A story as ids, the labels of what the LLM should have written (-100 elsewhere), and where its blocks begin.

    A picture that is shown takes as many ids, all the slot's, as it has image tokens; `images` holds those, (K, W).
    """

    ids: list[int]
    labels: list[int]
    blocks: list[int]
    images: list[Tensor] = field(default_factory=list)

    @property
    def labelled(self) -> int:
        """How many ids the LLM should have written."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class TextBatch:
    """Sequences by the name of their text loss, each name a batch of its own, padded by itself; and what their blocks
    should show, in order. `uses_diffusion_loss` asks for the pictures' diffusion loss too."""

    sequences: dict[str, list[StorySequence]]
    targets: list[PictureTarget]
    uses_diffusion_loss: bool

    def counts(self) -> dict[str, int]:
        """How many ids each text loss is a mean over."""
        return {name: sum(one.labelled for one in some) for name, some in self.sequences.items()}


def batch_losses(
    llm: FrozenLLM,
    batch: TextBatch,
    picture_losses: Callable[[Tensor, Sequence[PictureTarget], bool], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The text losses and the pictures' losses, one forward of the LLM for each name."""
    states, losses = [], {}
    for name, sequences in batch.sequences.items():
        if sequences:
            found, losses[name] = story_losses(llm, sequences)
            states.append(found)
        elif is_sharded(llm):
            losses[name] = _idle(llm)
    if not states:
        return losses
    return losses | picture_losses(torch.cat(states), batch.targets, batch.uses_diffusion_loss)


def story_sequence(llm: FrozenLLM, turns: Sequence[Turn]) -> StorySequence:
    """Every reply counts: its text, [IMG0] and the end mark; later vokens and pictures are given, never asked for.

    BadInputError for a story longer than the LLM reads.
    """
    prompt = chat_prompt(llm, turns)
    ids = prompt.spread
    check_context(llm, ids)
    labels = [IGNORED] * len(ids)
    unasked = set(llm.voken_ids[1:])
    end = llm.chat.end
    last = {end, llm.picture_opens}
    for index, turn in enumerate(turns):
        start = chat_prompt(llm, [*turns[:index], Turn(turn.request)]).length
        stop = next(position for position in range(start, len(ids)) if ids[position] in last)
        for position in range(start, stop + 1 if ids[stop] == end else stop):
            if ids[position] not in unasked:
                labels[position] = ids[position]
    return StorySequence(ids, labels, block_starts(ids, llm.voken_ids), prompt.images)


def check_context(llm: FrozenLLM, ids: Sequence[int]) -> None:
    """BadInputError for more ids than the LLM reads: some fail there, and others go on with nonsense."""
    if len(ids) > (context := llm.context):
        raise BadInputError(
            f"A story of {len(ids)} tokens is longer than the {context} that this LLM reads. Take shorter stories, or "
            "an LLM that reads more."
        )


def story_losses(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> tuple[Tensor, Tensor]:
    """One forward over stories padded behind: voken states of all blocks (k, V, L), and the text loss."""
    # no attention mask: padding stands behind everything that counts, and attention is causal
    hidden = _hidden(llm, sequences)
    blocks = [(row, start) for row, sequence in enumerate(sequences) for start in sequence.blocks]
    states = gather_voken_states(hidden, blocks, len(llm.voken_ids))
    return states, _text_loss(llm, sequences, hidden)


def text_losses(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """The same forward for sequences that hold no voken blocks: the text loss alone."""
    return _text_loss(llm, sequences, _hidden(llm, sequences))


def _hidden(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """(B, S, L) last-layer states."""
    known = llm.begin(len(sequences))
    positions = _positions(llm, sequences, known.get_seq_length())
    return llm.read(_embed(llm, sequences), past_key_values=known, **positions).last_hidden_state


def _positions(llm: FrozenLLM, sequences: Sequence[StorySequence], first: int) -> dict[str, Tensor]:
    """Position ids from `first` on, where a decoder cannot count them by itself."""
    if llm.family.axes == 1:
        return {}
    rows = [
        llm.family.positions(len(one.ids), list(placed(one.ids, one.images, llm.picture_id))) + first
        for one in sequences
    ]
    return {"position_ids": stack_positions(rows).to(llm.device)}


def _idle(llm: FrozenLLM) -> Tensor:
    """0, made by a whole forward: a process with nothing to read, so that the others have its part of the weights."""
    return 0.0 * _hidden(llm, [StorySequence(llm.voken_ids[:1], [IGNORED], [], [])]).sum()


def _text_loss(llm: FrozenLLM, sequences: Sequence[StorySequence], hidden: Tensor) -> Tensor:
    asked = [
        (row, position - 1, label)
        for row, sequence in enumerate(sequences)
        for position, label in enumerate(sequence.labels)
        if label != IGNORED
    ]
    row, position, label = (torch.tensor(column, device=llm.device) for column in zip(*asked, strict=True))
    return voken_loss(llm.logits(hidden[row, position]), label)


def _embed(llm: FrozenLLM, sequences: Sequence[StorySequence]) -> Tensor:
    """(B, S, W), padded behind, pictures in their places."""
    pad = llm.tokenizer.pad_token_id or 0
    rows = [torch.tensor(sequence.ids) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(llm.device)
    slots = ids == llm.picture_id
    embedded = llm.family.widen(llm.embed(ids.masked_fill(slots, pad)))
    images = [image for sequence in sequences for image in sequence.images]
    return embedded.masked_scatter(slots[..., None], torch.cat(images).to(embedded)) if images else embedded
