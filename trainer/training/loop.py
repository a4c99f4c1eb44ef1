"""The loop that all stages share: a step's examples, split among processes and parts, and one gradient of them.

Every loss is a mean over all that a step counts (pictures, words), wherever they are: a part's own means are weighed
by how much of the step's total it holds. So two processes, or two parts one after the other, give the gradient and
the losses that one process gives with the whole batch, to rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.errors import BadInputError

from ..common.progress import Progress, Terminated, TrainingError, interrupts
from ..data.source import DataSource, Shard
from ..feature_cache.cache import CachedFeatures
from .checkpoint import Run
from .config import OptimConfig, StageRecipe
from .optimise import descend
from .run_summary import plot_losses
from .state import Parts, load_optimizer, load_random, load_weights, resuming

PLOT_SECONDS = 30.0  # between two drawings of the losses, each of which takes as long as many a step


@dataclass(frozen=True)
class Batch:
    """A part of a step: what the stage's own losses are made from, and how many of what each of them is a mean over."""

    inputs: Any
    counts: dict[str, int]


Losses = dict[str, Tensor]


class TrainableModules(nn.Module):
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


def build_optimizer(settings: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The recipe's optimiser over parameter groups with rates of their own."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInputError(
            "optimizer is adamw8bit, but bitsandbytes is not installed: pip install bitsandbytes, or set "
            "optimizer=adamw, which needs 6 bytes more for each trained parameter."
        ) from error
    return AdamW8bit(groups)


def attention_for(recipe: StageRecipe, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What a step's way there and back is to stand in: gradient checkpointing computes some of it twice.

    On a CPU in bf16 torch's fused attention takes three times as long on its way back as the plain one.
    """
    is_bf16 = "bf16" in (recipe.optim.precision, recipe.model.llm_precision)
    return partial(sdpa_kernel, SDPBackend.MATH) if is_bf16 and device.type == "cpu" else nullcontext


class TrainLoop:
    """What learns, how, and where it stands; prepared for however many processes there are."""

    def __init__(
        self,
        run: Run,
        trained: TrainableModules,
        groups: list[dict[str, Any]],
        source: DataSource,
        features: CachedFeatures | None = None,
    ) -> None:
        self.run, self.accelerator, self.settings = run, run.accelerator, run.recipe.optim
        self.features = features
        self.shard = Shard(self.accelerator.process_index, self.accelerator.num_processes)
        self._check_batch()
        optimizer = build_optimizer(self.settings, groups)
        self.trained: nn.Module
        self.optimizer: Optimizer
        self.trained, self.optimizer = self.accelerator.prepare(trained, optimizer)
        # not prepared: accelerate would move it on by as many steps as there are processes
        self.schedule = get_cosine_schedule_with_warmup(
            optimizer, int(self.settings.warmup * self.settings.steps), self.settings.steps
        )
        self.average = self._averaging() if self.settings.ema_decay else None
        self.parts = Parts(self.schedule, source, self.average)
        self.accelerator.register_save_state_pre_hook(self._save_unwrapped)
        weights = run.recipe.loss
        self.text_weight = weights.text_weight
        self.weights = {"image": weights.image_weight, "caption": weights.caption_weight}

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def _check_batch(self) -> None:
        batch, least = self.settings.batch, self.shard.world * self.settings.accumulation
        if batch < least:
            raise BadInputError(
                f"batch is {batch}, for {self.shard.world} processes with {self.settings.accumulation} parts each: "
                f"some would have nothing to do. Set batch={least} or more."
            )

    def _averaging(self) -> EMAModel:
        return EMAModel(
            self.trained.parameters(), decay=self.settings.ema_decay, use_ema_warmup=True, power=0.75
        )

    def _save_unwrapped(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        """Names the weights as one process does, so that any number of processes can go on from them; adds ours."""
        weights[:] = (
            [self.accelerator.unwrap_model(model).state_dict() for model in models] if weights else []
        )
        if self.accelerator.is_main_process:
            self.parts.save(Path(folder))

    def load_state(self, folder: Path) -> None:
        """Everything that `Accelerator.save_state` and `_save_unwrapped` wrote, all of it read by us.

        accelerate would unpickle some of it, and passes over random states that are broken.
        """
        with resuming(folder):
            load_weights(self.accelerator.unwrap_model(self.trained), folder)
            load_optimizer(self.optimizer, folder)
            self.parts.load(folder)
            load_random(folder, self.accelerator.process_index)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step of the optimiser down the gradient of all processes' batches; returns the losses over all of them.

        TrainingError, and no step, where the loss or its gradient is no number.
        """
        totals = self._totals(batches)
        sums = dict.fromkeys(totals, 0.0)
        attention = attention_for(self.run.recipe, self.accelerator.device)
        for index, batch in enumerate(batches):
            with self._alone(last=index == len(batches) - 1), attention():
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
            total = total + self._weight(name) * shares[name] * self.shard.world * loss
        return total

    def _weight(self, name: str) -> float:
        """Text losses of several kinds weigh alike."""
        return self.weights.get(name, self.text_weight)

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
        if self.shard.world == 1:
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
    loop: TrainLoop,
    batches: Callable[[int], Sequence[Batch]],
    preview: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Step, report, save every so often; at the end `save` writes the result. Only the first process writes.

    Ctrl-C and SIGTERM end the step, save, and are passed on as KeyboardInterrupt and Terminated.
    """
    try:
        _train(loop, batches, preview)
        if loop.is_main:
            with loop.averaged():
                save(loop.settings.steps)
    finally:
        loop.run.end()


def _train(
    loop: TrainLoop, batches: Callable[[int], Sequence[Batch]], preview: Callable[[int], None]
) -> None:
    run, steps, settings = loop.run, loop.settings.steps, loop.run.recipe.run
    start = run.resume(loop.load_state) if run.resuming else 0
    if loop.average is not None:
        loop.average.to(loop.accelerator.device)  # a saved one comes back on the CPU
    progress = Progress(steps, start=start)
    since_save: list[float] = []
    plotted = time.monotonic()
    with interrupts() as interrupted:
        for step in range(start + 1, steps + 1):
            losses = _step(loop, step, batches)
            stops = loop.stops(bool(interrupted))
            since_save.append(loop.weighted(losses))
            _report(loop, progress, step, losses, first=step == start + 1)
            if step % settings.save_every == 0 or step == steps or stops:
                run.save_state(step, sum(since_save) / len(since_save))
                since_save = []
                if step == steps or stops or time.monotonic() - plotted > PLOT_SECONDS:
                    _plot(loop)
                    plotted = time.monotonic()
            if step % settings.preview_every == 0 and (loop.is_main or run.shards):
                with loop.averaged():
                    preview(step)
            if stops:
                if loop.is_main:
                    print(f"interrupted: {run.safe()} Go on with --resume.")
                raise (interrupted or [Terminated()])[0]  # or another process was asked
    loop.accelerator.end_training()


def _step(loop: TrainLoop, step: int, batches: Callable[[int], Sequence[Batch]]) -> dict[str, float]:
    try:
        return loop.step(batches(step))
    except TrainingError as error:
        _plot(loop)
        raise TrainingError(
            f"step {step}: {error}. {loop.run.safe()} Set lower rates (mapper_lr, voken_lr, lora_lr) and go on from "
            "there with --resume."
        ) from error


def _report(loop: TrainLoop, progress: Progress, step: int, losses: dict[str, float], first: bool) -> None:
    if not loop.is_main:
        return
    progress.update(step, loop.settings.batch, **losses)
    loop.run.log(step, losses)
    if first and loop.features is not None:
        print(loop.features.summary(), flush=True)


def _plot(loop: TrainLoop) -> None:
    if loop.is_main:
        plot_losses(loop.run.metrics(), loop.run.out / "losses.png")
