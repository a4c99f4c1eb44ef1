"""The training loop of one model in one process: step, report, save every so often and when asked to stop.

`loop.py` is the stages' loop, which runs in several processes and resumes from saved states.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..common.progress import Progress, TrainingError, interrupts


def optimise(
    optimizer: Optimizer,
    schedule: LRScheduler,
    step_loss: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    samples: int,
    save: Callable[[], None],
    save_every: int,
    weights: Mapping[str, float] | None = None,
    max_norm: float = 1.0,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Minimises the weighted sum of what `step_loss(step)` returns, steps counted from 1, of `samples` samples each.

    A loss without an entry in `weights` has weight 1. The gradient is clipped to the norm `max_norm`; `math.inf`
    leaves it as it is. `after_step` updates an average of the weights. `save` runs every `save_every` steps and after
    the last. Ctrl-C and SIGTERM finish the step, save, and are raised as KeyboardInterrupt and Terminated.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    progress = Progress(steps)
    with interrupts() as interrupted:
        for step in range(1, steps + 1):
            losses = step_loss(step)
            _weighted_sum(losses, weights or {}).backward()
            values = {name: loss.item() for name, loss in losses.items()}
            _descend_or_explain(step, parameters, optimizer, schedule, values, max_norm)
            if after_step is not None:
                after_step()
            progress.update(step, samples, **values)
            if step % save_every == 0 or step == steps or interrupted:
                save()
            if interrupted:
                raise interrupted[0]


def _weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return sum((weights.get(name, 1.0) * loss for name, loss in losses.items()), torch.zeros(()))


def _descend_or_explain(
    step: int,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    losses: dict[str, float],
    max_norm: float,
) -> None:
    try:
        descend(parameters, optimizer, schedule, losses, max_norm=max_norm)
    except TrainingError as error:
        raise TrainingError(
            f"step {step}: {error}. What earlier steps saved is kept. Set a lower learning rate."
        ) from error


def descend(
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    losses: dict[str, float],
    clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_,
    max_norm: float = 1.0,
) -> None:
    """One step of the optimiser with the gradient clipped to `max_norm`; TrainingError, and no step, where the
    gradient is not finite. `clip` is torch's function or accelerate's, which knows of other processes."""
    norm = clip(parameters, max_norm)
    if not torch.isfinite(norm):
        total = sum(losses.values())
        what = (
            f"the loss is {total:g}" if not math.isfinite(total) else f"the gradient is {norm.item():g} long"
        )
        raise TrainingError(f"{what} ({', '.join(f'{name} {value:g}' for name, value in losses.items())})")
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
