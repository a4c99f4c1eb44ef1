"""Pictures that show, while a stage trains, what its vokens ask for by then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..llm.sequences import story_losses, story_sequence
from .setup import Setup


def preview_with(setup: Setup) -> Callable[[int], None]:
    """Draws the source's previews at a step, their true texts given, into the run's folder."""
    examples = setup.source.previews() if setup.diffusion.draws else []

    @torch.no_grad()
    def preview(step: int) -> None:
        if not examples:
            return
        with evaluating(setup.adapted):
            sequences = [story_sequence(setup.llm, turns) for turns in examples]
            states, _ = story_losses(setup.llm, sequences)
            pictures = setup.diffusion.generate(setup.mapper(states), setup.mapper.negative())
            setup.run.preview(step, pictures)

    return preview


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """The model without dropout for a while, where it was training as a whole."""
    if model is None or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
