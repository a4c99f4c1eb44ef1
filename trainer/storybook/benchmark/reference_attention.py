"""Reference attention: the later pictures of a story look at an earlier one, so that a hero keeps its texture.

Nothing is trained. At late denoising steps the reference, with as much noise as the new picture has by then, goes
through the UNet too; the new picture's self-attention then finds keys and values of both. The idea is that of
"reference-only" control and of consistent self-attention (StoryDiffusion, arXiv 2405.01434), in a form of our own.

A row of the benchmark and no more: it was measured and does not help (storybook/README.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class _LookingProcessor:
    """Wraps a self-attention's processor: keeps what the reference is there, or lets others look at it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.kept: Tensor | None = None
        self.keeping = False

    def __call__(
        self, attention: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any
    ) -> Tensor:
        if self.keeping or self.kept is None:
            self.kept = hidden_states
            return self.inner(attention, hidden_states, *arguments, **keywords)
        both = torch.cat((hidden_states, self.kept), 1)
        return self.inner(attention, hidden_states, encoder_hidden_states=both)


@contextmanager
def looking_at(
    pipeline: DiffusionPipeline, reference: Tensor, below: int = 450, seed: int = 0
) -> Iterator[None]:
    """While this lasts, what the pipeline draws looks at `reference`, scaled latents (1, C, h, w) of its own size.

    It does so at timesteps under `below`, which then cost twice as much: earlier ones decide what stands where, and
    looking there moves and doubles things. The reference goes along under the new picture's conditioning. The UNet is
    afterwards as it was.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    processors, plain = unet.attn_processors, unet.forward
    looking = {
        name: _LookingProcessor(processor) if name.endswith("attn1.processor") else processor
        for name, processor in processors.items()
    }
    ours = [processor for processor in looking.values() if isinstance(processor, _LookingProcessor)]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).to(reference)

    def forward(sample: Tensor, timestep: Tensor, *arguments: Any, **keywords: Any) -> Any:
        for processor in ours:
            processor.kept = None
        if timestep.reshape(-1)[0] >= below:
            return plain(sample, timestep, *arguments, **keywords)
        noisy = scheduler.add_noise(reference, noise, timestep.reshape(-1)[:1])
        for processor in ours:
            processor.keeping = True
        plain(noisy.to(sample.dtype).expand(len(sample), -1, -1, -1), timestep, *arguments, **keywords)
        for processor in ours:
            processor.keeping = False
        return plain(sample, timestep, *arguments, **keywords)

    unet.set_attn_processor(dict(looking))
    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        unet.set_attn_processor(processors)
