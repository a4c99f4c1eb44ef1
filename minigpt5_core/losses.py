"""What training minimises: next tokens, noise with min-SNR weighting (arXiv 2303.09556) or flow, caption alignment.

The three are MiniGPT-5's (arXiv 2310.02239, section 3.3). Everything is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label of positions that carry no loss


def voken_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy where each position's own target is given, -100 for none: (..., vocabulary), (...).

    For the V states that predict a voken block the targets are the voken ids. Zero when nothing counts.
    """
    summed = functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return summed / (targets != IGNORED).sum().clamp(min=1)


def compute_snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio of each timestep, (B,), from a scheduler's `alphas_cumprod`, (steps,)."""
    signal = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return signal / (1 - signal)


def diffusion_loss(
    prediction: Tensor, target: Tensor, snr: Tensor, gamma: float = 5.0, velocity: bool = False
) -> Tensor:
    """Squared error of the predicted noise, (B, ...), each sample weighted by min(snr, gamma) / snr; snr is (B,).

    A velocity's error is (snr + 1) / snr times that of the noise it implies, so its weight is min(snr, gamma) /
    (snr + 1) (arXiv 2303.09556, appendix).
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    weights = snr.clamp(max=gamma) / (snr + 1) if velocity else (gamma / snr).clamp(max=1)
    return (errors * weights).mean()


def flow_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity of rectified flow, noise minus clean, (B, ...) (arXiv 2403.03206).

    All samples have the same weight: how often a timestep is sampled is its weight.
    """
    return (prediction.float() - (noise.float() - clean.float())).square().mean()


def caption_loss(answer: Tensor, target: Tensor, std: Tensor | None = None) -> Tensor:
    """Mean squared distance of the mapper's answer from the text encoder's, both (B, T, C).

    Published: in the encoder's own scale, where a few dimensions of large scale drown the rest. With `std` (T, C)
    both sides are standardised per token and dimension first (the means cancel).
    """
    difference = answer.float() - target.float()
    return (difference if std is None else difference / std).square().mean()


class Statistics:
    """Mean and standard deviation, each (T, C), of the text encoder's output for many captions, given batch by batch.

    A thousand captions of Flux would be 4 GB at once. A standard deviation below `smallest` is raised to it: CLIP's
    first token is the same for every caption.
    """

    def __init__(self, smallest: float = 1e-3) -> None:
        self.smallest = smallest
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, targets: Tensor) -> None:
        """(captions, T, C)."""
        exact = targets.double()
        self.count += len(exact)
        self.sum = self.sum + exact.sum(0)
        self.squares = self.squares + exact.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.sum / self.count).float()

    @property
    def std(self) -> Tensor:
        mean = torch.as_tensor(self.sum / self.count)
        variance = torch.as_tensor(self.squares / self.count) - mean.square()
        return variance.clamp(min=0).sqrt().float().clamp(min=self.smallest)


def drop_states(
    states: Tensor, probability: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Classifier-free dropout: zeros in place of a sample's voken states (B, V, L), with the given probability.

    Returns the states and which samples were dropped, (B,); their caption target is the empty text's. A dropped
    sample sends no gradient of its picture to the LLM. `generator` lives on the CPU, whatever the device.
    """
    dropped = (torch.rand(len(states), generator=generator) < probability).to(states.device)
    return states.masked_fill(dropped[:, None, None], 0), dropped
