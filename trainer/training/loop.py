"""The loop both stages share: a step's examples, split among processes and parts of a batch, and one gradient of them.

Every loss is a mean over all that a step counts (pictures, words), wherever they are: a part's own means are weighed
by how much of the step's total it holds. So two processes, or two parts one after the other, give the gradient and
the losses that one process gives with the whole batch, to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.errors import BadInputError
from minigpt5_core.mapper import Mapper

from ..common.progress import Progress, Terminated, TrainingError, interrupts
from ..data.source import Share
from ..feature_cache.cache import CachedFeatures
from .checkpoint import Run
from .config import StageRecipe
from .optimise import descend
from .run_summary import plot_losses


@dataclass(frozen=True)
class Batch:
    """A part of a step: what the stage's own losses are made from, and how many of what each of them is a mean over."""

    inputs: Any
    counts: dict[str, int]


Losses = dict[str, Tensor]


class Trained(nn.Module):
    """Everything that learns, and nothing else: what the optimiser sees and a saved state holds.

    The losses come out of `forward`, because that is where accelerate lets processes and precision come in.
    """

    def __init__(
        self,
        mapper: Mapper,
        adapter_parameters: Sequence[nn.Parameter],
        compute: Callable[[Any], Losses],
    ) -> None:
        super().__init__()
        self.mapper = mapper
        self.adapter = nn.ParameterList(adapter_parameters)
        self.compute = compute

    def forward(self, inputs: Any) -> Losses:
        return self.compute(inputs)


def build_optimizer(recipe: StageRecipe, groups: list[dict[str, Any]]) -> Optimizer:
    """The recipe's optimiser over parameter groups with rates of their own."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInputError(
            "optimizer is adamw8bit, but bitsandbytes is not installed: pip install bitsandbytes, or set "
            "optimizer=adamw, which needs 6 bytes more for each trained parameter."
        ) from error
    return AdamW8bit(groups)


class Training:
    """What learns, how, and where it stands; prepared for however many processes there are."""

    def __init__(
        self,
        run: Run,
        trained: Trained,
        groups: list[dict[str, Any]],
        source: Any = None,
        features: CachedFeatures | None = None,
    ) -> None:
        self.run, self.recipe, self.accelerator = run, run.recipe, run.accelerator
        self.features = features
        recipe = self.recipe
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        if recipe.batch < self.share.world * recipe.accumulation:
            raise BadInputError(
                f"batch is {recipe.batch}, for {self.share.world} processes with {recipe.accumulation} parts each: "
                f"some would have nothing to do. Set batch={self.share.world * recipe.accumulation} or more."
            )
        optimizer = build_optimizer(recipe, groups)
        self.trained: nn.Module
        self.optimizer: Optimizer
        self.trained, self.optimizer = self.accelerator.prepare(trained, optimizer)
        # not prepared: accelerate would move it on by as many steps as there are processes
        self.schedule = get_cosine_schedule_with_warmup(
            optimizer, int(recipe.warmup * recipe.steps), recipe.steps
        )
        self.average = self._averaging() if recipe.ema_decay else None
        for part in (self.schedule, source, self.average):
            if part is not None:
                self.accelerator.register_for_checkpointing(part)
        self.accelerator.register_save_state_pre_hook(self._save_unwrapped)
        self.accelerator.register_load_state_pre_hook(self._load_unwrapped)
        self.weights = {"image": recipe.image_weight, "caption": recipe.caption_weight}

    def _averaging(self) -> EMAModel:
        return EMAModel(
            self.trained.parameters(), decay=self.recipe.ema_decay, use_ema_warmup=True, power=0.75
        )

    def _save_unwrapped(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        """Names the weights as one process does, so that any number of processes can go on from them."""
        weights[:] = (
            [self.accelerator.unwrap_model(model).state_dict() for model in models] if weights else []
        )

    def _load_unwrapped(self, models: list[nn.Module], folder: str) -> None:
        for model in models:
            load_model(self.accelerator.unwrap_model(model), Path(folder) / "model.safetensors")
        models.clear()  # nothing is left for accelerate to load

    def split(self, items: Sequence[Any]) -> list[list[Any]]:
        """This process's items in `accumulation` parts."""
        return [list(items[part :: self.recipe.accumulation]) for part in range(self.recipe.accumulation)]

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step of the optimiser down the gradient of all processes' batches; returns the losses over all of them.

        TrainingError, and no step, where the loss or its gradient is no number.
        """
        totals = self._totals(batches)
        sums = dict.fromkeys(totals, 0.0)
        for index, batch in enumerate(batches):
            with self._alone(last=index == len(batches) - 1):
                losses = self.trained(batch.inputs)
                shares = {name: batch.counts[name] / (totals[name] or 1) for name in losses}
                self.accelerator.backward(self._total(losses, shares))
            for name, loss in losses.items():
                sums[name] += loss.item() * shares[name]
        found = {name: loss for name, loss in self._over_processes(sums).items() if totals[name]}
        clip = self.accelerator.clip_grad_norm_
        descend(list(self.trained.parameters()), self.optimizer, self.schedule, found, clip)
        if self.average is not None:
            self.average.step(self.trained.parameters())
        return found

    def _alone(self, last: bool) -> AbstractContextManager:
        """Processes exchange gradients once a step, at its last part."""
        return nullcontext() if last else self.accelerator.no_sync(self.trained)

    def _total(self, losses: Losses, shares: dict[str, float]) -> Tensor:
        # a parameter that no loss has reached is waited for in vain by the other processes
        total = 0.0 * torch.stack([parameter.sum() for parameter in self.trained.parameters()]).sum()
        for name, loss in losses.items():
            # processes' gradients are averaged; these are to be summed
            total = total + self._weight(name) * shares[name] * self.share.world * loss
        return total

    def _weight(self, name: str) -> float:
        """Text losses of several kinds weigh alike."""
        return self.weights.get(name, self.recipe.text_weight)

    def weighted(self, losses: dict[str, float]) -> float:
        """What is minimised: the losses, weighed."""
        return sum(self._weight(name) * loss for name, loss in losses.items())

    def _totals(self, batches: Sequence[Batch]) -> dict[str, float]:
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in batch.counts.items():
                counts[name] = counts.get(name, 0) + count
        return self._over_processes(counts)

    def _over_processes(self, values: dict[str, float]) -> dict[str, float]:
        """The sum over processes; all have the same names."""
        if self.share.world == 1:
            return dict(values)
        here = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        summed = self.accelerator.reduce(here.to(self.accelerator.device), "sum").tolist()
        return dict(zip(sorted(values), summed, strict=True))

    def stops(self, interrupted: bool) -> bool:
        """Whether any process was asked to stop."""
        return self._over_processes({"interrupted": float(interrupted)})["interrupted"] > 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the average over the steps in place of the newest weights, where the recipe asks for one."""
        if self.average is None:
            yield
            return
        parameters = list(self.trained.parameters())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)


def train(
    training: Training,
    draw: Callable[[int], Sequence[Batch]],
    preview: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Step, report, save every so often; at the end `save` writes the result. Only the first process writes.

    Ctrl-C and SIGTERM end the step, save, and are passed on as KeyboardInterrupt and Terminated.
    """
    run, recipe, main = training.run, training.recipe, training.accelerator.is_main_process
    start = run.resume() if run.resuming else 0
    if training.average is not None:
        training.average.to(training.accelerator.device)  # a saved one comes back on the CPU
    progress = Progress(recipe.steps, start=start)
    since: list[float] = []  # the last save
    with interrupts() as interrupted:
        for step in range(start + 1, recipe.steps + 1):
            try:
                losses = training.step(draw(step))
            except TrainingError as error:
                raise TrainingError(
                    f"step {step}: {error}. {run.safe()} Set lower rates (mapper_rate, row_rate, lora_rate) and go on "
                    "from there with --resume."
                ) from error
            stops = training.stops(bool(interrupted))
            since.append(training.weighted(losses))
            if main:
                progress.update(step, recipe.batch, **losses)
                run.log(step, losses)
                if step == start + 1 and training.features is not None:
                    print(training.features.told(), flush=True)
            if step % recipe.save_every == 0 or step == recipe.steps or stops:
                run.save_state(step, sum(since) / len(since))
                since = []
                if main:
                    plot_losses(run.metrics(), run.out / "losses.png")
            if step % recipe.preview_every == 0 and (main or run.shards):
                with training.averaged():
                    preview(step)
            if stops:
                if main:
                    print(f"interrupted: {run.safe()} Go on with --resume.")
                raise (interrupted or [Terminated()])[0]  # or another process was asked
    training.accelerator.end_training()
    if main:
        with training.averaged():
            save(recipe.steps)
