"""A saved state's files and how each is read: nothing in them is run, and what does not fit is refused.

schedule.json         where the learning rates' schedule stands
source.json           the place in the data
average.safetensors   the average over the steps, where there is one; its numbers are in the header
model.safetensors, optimizer.bin, random_states_N.pkl   accelerate's, the pickles among them read with weights_only
custom_checkpoint_N.pkl   schedule, source and average in states of earlier versions, read with weights_only too
"""

import json
import math
import pickle
import random
import re
from _codecs import encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import Tensor, nn

from minigpt5_core.errors import BadInputError
from minigpt5_core.tensor_files import atomic_save

SCHEDULE, SOURCE, AVERAGE = "schedule.json", "source.json", "average.safetensors"
PLACE = (
    "base_lrs",
    "last_epoch",
    "_step_count",
    "_last_lr",
)  # what of a schedule moves; the rest is the recipe's
NUMBERS = "minigpt5.average"
# what numpy and bytes are rebuilt by, which torch does not know to be harmless
ARRAYS: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32)), encode]
MERSENNE = 624  # words of the generators' state
UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError, EOFError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


class Parts:
    """What a state holds beside weights and optimiser: the schedule, the source of the data, the average of the steps.

    `average` may be None. A source whose place follows from the step alone has nothing to keep.
    """

    def __init__(self, schedule: Any, source: Any, average: Any) -> None:
        self.schedule, self.source, self.average = schedule, source, average

    def save(self, folder: Path) -> None:
        """Writes a file each. OSError where the disk refuses."""
        state = self.schedule.state_dict()
        _write(folder / SCHEDULE, {name: state[name] for name in PLACE})
        _write(folder / SOURCE, self.source.state_dict())
        if self.average is not None:
            numbers = self.average.state_dict()
            weights = {str(index): weight for index, weight in enumerate(numbers.pop("shadow_params"))}
            atomic_save(weights, folder / AVERAGE, {"format": "pt", NUMBERS: json.dumps(numbers)})

    def load(self, folder: Path) -> None:
        """Reads them back; raises one of `UNREADABLE` for what does not fit."""
        # earlier versions numbered them in this order, and left out a source that had nothing to keep
        old = sorted(folder.glob("custom_checkpoint_*.pkl"), key=lambda file: int(file.stem.rsplit("_")[-1]))
        self._load_schedule(_json(folder / SCHEDULE, old[:1]))
        if own := self.source.state_dict():
            found = _json(folder / SOURCE, old[1:2])
            _check_fits(found, own, SOURCE)
            self.source.load_state_dict(found)
        if self.average is not None:
            self._load_average(_average(folder / AVERAGE, old[-1:]))

    def _load_schedule(self, found: Any) -> None:
        state = self.schedule.state_dict()
        moves = {name: found[name] for name in PLACE} if isinstance(found, dict) else found
        _check_fits(moves, {name: state[name] for name in PLACE}, SCHEDULE)
        self.schedule.load_state_dict(state | moves)

    def _load_average(self, found: Any) -> None:
        own = self.average.state_dict()
        weights = found.pop("shadow_params")
        _check_fits(found, {name: own[name] for name in own if name != "shadow_params"}, AVERAGE)
        shapes = [weight.shape for weight in own["shadow_params"]]
        if [weight.shape for weight in weights] != shapes or not all(
            torch.isfinite(one).all() for one in weights
        ):
            raise ValueError(f"{AVERAGE} does not hold the average of what is trained")
        self.average.load_state_dict(found | {"shadow_params": weights})


@contextmanager
def resuming(folder: Path) -> Iterator[None]:
    """Turns what a broken state raises into BadInputError, which says what to do."""
    try:
        yield
    except BadInputError:
        raise
    except UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadInputError(
            f"--resume: the state in {folder} cannot be gone on from ({type(error).__name__}: {why}). Delete that "
            "folder: --resume then takes the state before; or leave --resume out to start anew."
        ) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """All weights of what is trained, strictly."""
    load_model(model, folder / "model.safetensors")


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """The optimiser's averages and settings."""
    optimizer.load_state_dict(read_pickle(folder / "optimizer.bin"))


def load_random(folder: Path, process: int) -> None:
    """The random states of this process; a process that the run did not have before keeps its own."""
    file = folder / f"random_states_{process}.pkl"
    if process and not file.exists():
        return
    states = read_pickle(file)
    _check_numpy(states["numpy_random_seed"])
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    cards = states.get("torch_cuda_manual_seed", [])
    if torch.cuda.is_available() and len(cards) == torch.cuda.device_count():  # else it was another machine
        torch.cuda.set_rng_state_all(cards)


def _check_numpy(state: Any) -> None:
    """numpy believes the place in its numbers, and would read beyond them."""
    kind, words, place = state[:3]
    if kind != "MT19937" or len(words) != MERSENNE or not 0 <= place <= MERSENNE or not any(words):
        raise ValueError("numpy's random state is none")


def read_pickle(file: Path) -> Any:
    """A pickled file that holds numbers, texts, lists, dicts and arrays of numbers; nothing in it is run.

    BadInputError for one that would run something.
    """
    try:
        with torch.serialization.safe_globals(ARRAYS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadInputError(
                f"{file} is not loaded: to be read it would run code ({found[1]}), which a saved state never needs. It "
                "may be hostile: delete the run's folder, or the state if you know where it comes from."
            ) from error
        raise


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values) + "\n", encoding="utf-8")


def _json(file: Path, old: list[Path]) -> Any:
    """A part of ours, or what an earlier version wrote in its place."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if not old:
        raise FileNotFoundError(f"it lacks {file.name}")
    return read_pickle(old[0])


def _average(file: Path, old: list[Path]) -> Any:
    if not file.is_file():
        return _json(file, old)
    with safe_open(file, framework="pt") as opened:
        names = sorted(opened.keys(), key=int)
        weights: list[Tensor] = [opened.get_tensor(name) for name in names]
        return json.loads((opened.metadata() or {})[NUMBERS]) | {"shadow_params": weights}


def _check_fits(found: Any, own: Any, where: str) -> None:
    """ValueError unless `found` is made like `own`: the same names, lists as long, and numbers for numbers."""
    if isinstance(own, dict):
        fits = isinstance(found, dict) and found.keys() == own.keys()
    elif isinstance(own, list):
        fits = isinstance(found, list) and len(found) == len(own)
    elif isinstance(own, float):
        fits = type(found) in (int, float) and math.isfinite(found)
    else:
        fits = type(found) is type(own) and (not isinstance(found, int) or 0 <= found < 2**63)
    if not fits:
        raise ValueError(f"{where} holds {found!r:.60} where {own!r:.60} was expected")
    inside = own.keys() if isinstance(own, dict) else range(len(own)) if isinstance(own, list) else ()
    for key in inside:
        _check_fits(found[key], own[key], where)
