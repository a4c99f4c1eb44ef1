"""What a long run prints, and how it is stopped: a line with losses, speed and time left; Ctrl-C and SIGTERM."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Prints a line every `every` seconds: step, losses (mean since the last line), samples/s, time left, memory."""

    def __init__(self, steps: int, every: float = 15.0, start: int = 0) -> None:
        self.steps, self.every, self.first = steps, every, start
        self.started = self.printed = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = self.samples = 0

    def update(self, step: int, samples: int, **losses: float) -> None:
        """Account for a finished step (counted from 1) of `samples` samples."""
        self.count += 1
        self.samples += samples
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        now = time.monotonic()
        if now - self.printed < self.every and step < self.steps:
            return
        elapsed = now - self.started
        left = elapsed / max(1, step - self.first) * (self.steps - step)
        terms = "  ".join(f"{name} {total / self.count:.4f}" for name, total in self.sums.items())
        print(
            f"step {step}/{self.steps}  {terms}  {self.samples / elapsed:.1f} samples/s  {left / 60:.1f} min left  "
            f"{memory():.1f} GB",
            flush=True,
        )
        self.printed, self.sums, self.count = now, {}, 0


def memory() -> float:
    """GB that this process holds: on the GPU where there is one, else of the machine's memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class TrainingError(Exception):
    """A run that cannot continue: what happened, what is saved, and how to fix it."""


class Terminated(BaseException):
    """SIGTERM was received, and the work so far saved."""


@contextmanager
def interrupts() -> Iterator[list[BaseException]]:
    """Meanwhile Ctrl-C and SIGTERM only add the exception to raise to the list, so that a step is always completed."""
    caught: list[BaseException] = []
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    before = {
        number: signal.signal(number, lambda number, frame: caught.append(kinds[signal.Signals(number)]()))
        for number in kinds
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
