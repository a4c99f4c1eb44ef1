"""A training run's folder: states to go on from, what people watch meanwhile, and what explains it later.

states/step_000200/   weights, optimiser, schedule, place in the data, random states; the newest few and the best
metrics.jsonl         every step's losses; losses.png shows them; tensorboard/ has them too
run.json              recipe, versions, commit, what the data was
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import FileLock, Timeout
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm.weights import hash_weights

from ..common.images import grid
from ..common.progress import TrainingError
from ..common.provenance import describe
from ..llm.adapters import save_adapter
from .build_mapper import mapper_space
from .config import StageRecipe
from .run_summary import card

LOCK = ".lock"  # in the run's folder: one process at a time writes there


def start_accelerator(recipe: StageRecipe, out: Path) -> Accelerator:
    """On whatever devices there are, with the recipe's tracker; one that is not installed is said and left out."""
    tracker = recipe.run.tracker or None
    if tracker and not find_spec(tracker):
        print(
            f"{tracker} is not installed: pip install {tracker}. metrics.jsonl and losses.png are written without it."
        )
        tracker = None
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if recipe.optim.precision == "bf16" else "no",
        log_with=tracker,
        project_dir=str(out),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise BadInputError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which would cut up what is trained. Leave "
            "that out of accelerate's settings; a frozen LLM that is too large for a GPU is spread by shard_llm=true."
        )
    return accelerator


def restarted() -> bool:
    """Whether torchrun has started this process anew because one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Run:
    """A run's folder: states to resume from, previews, and at the end `mapper.safetensors` and `adapter/`.

    Of several processes the first writes it. Started anew by torchrun, they go on from the newest state by themselves.
    """

    def __init__(self, recipe: StageRecipe, out: Path, accelerator: Accelerator, resume: bool) -> None:
        self.recipe, self.out, self.accelerator = recipe, out, accelerator
        self.states = out / "states"
        self.data_name = ""
        if out.is_file() or any(parent.is_file() for parent in out.parents):
            raise BadInputError(f"--out {out} lies at or below a file. Choose a folder.")
        self.resuming = resume or (restarted() and bool(self.kept()))
        self.lock = FileLock(out / LOCK, blocking=False)
        if not self.resuming and (kept := self.kept()):
            raise BadInputError(
                f"--out {out} holds an earlier run, saved after step {max(kept)}. Go on from there with --resume, name "
                f"another folder, or delete {self.states} to start anew."
            )

    @property
    def shards(self) -> bool:
        """Whether the LLM is spread over several processes, none of which can run it alone."""
        return self.recipe.model.shard_llm and self.accelerator.num_processes > 1

    @property
    def llm_device(self) -> torch.device:
        """Where the LLM is read to: what is to be spread has no room on one device."""
        return torch.device("cpu") if self.shards else self.accelerator.device

    def begin(self, data_name: str) -> None:
        """Makes the folder ready, once all parts are loaded: until then what an earlier run left there is whole."""
        self.data_name = data_name
        if self.accelerator.is_main_process:
            self._prepare_folder()
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers(_project(self.recipe.run.tracker), config=_flat(asdict(self.recipe)))

    def end(self) -> None:
        """Lets others write into the folder again."""
        self.lock.release()

    def _prepare_folder(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._take_folder()
        if not self.resuming:  # what is left there was never whole
            shutil.rmtree(self.states, ignore_errors=True)
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
        text = json.dumps(self.describe(), indent=1) + "\n"
        (self.out / "run.json").write_text(text, encoding="utf-8")

    def _take_folder(self) -> None:
        """The lock goes with the process, however it ends."""
        try:
            self.lock.acquire()
        except Timeout as error:
            raise BadInputError(
                f"Another process is training into --out {self.out}. Wait for its end, or name another folder."
            ) from error
        except NotImplementedError:  # a file system without locks
            pass

    def describe(self) -> dict[str, Any]:
        """All that the run depends on."""
        data = self.recipe.data.path
        return describe(self.recipe, self.recipe.stage, self.data_name, Path(data) if data else None)

    def resume(self, load: Callable[[Path], None]) -> int:
        """Loads the newest state by `load`; returns the step it was saved at."""
        kept = self.kept()
        if not kept:
            raise BadInputError(
                f"--resume: {self.out} holds no saved state that is whole. Leave --resume out to start anew."
            )
        step = max(kept)
        load(self._state(step))
        if self.accelerator.is_main_process:
            self._cut_metrics(step)
        return step

    def _cut_metrics(self, step: int) -> None:
        """Leaves out the steps after this one, which will be made again; at no moment is there less than before."""
        text = "".join(json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step)
        fresh = self.out / "metrics.tmp"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.out / "metrics.jsonl")

    def kept(self) -> dict[int, float]:
        """The states that are whole: the mean loss before each, by step."""
        marks = (_mark(file) for file in self.states.glob("step_*/step.json"))  # written last
        return dict(mark for mark in marks if mark is not None)

    def _state(self, step: int) -> Path:
        return self.states / _name(step)

    def save_state(self, step: int, loss: float = math.inf) -> None:
        """Writes the whole state beside its place and moves it there; then drops all but the newest few and the best.

        TrainingError where it cannot be written, such as on a full disk; states from before stay as they are.
        """
        fresh, main = self.states / "fresh.tmp", self.accelerator.is_main_process
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(fresh))  # every process writes its random states
            self.accelerator.wait_for_everyone()
            if main:
                (fresh / "step.json").write_text(json.dumps({"step": step, "loss": loss}))
                shutil.rmtree(self._state(step), ignore_errors=True)
                os.replace(fresh, self._state(step))
                self._drop_old()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise TrainingError(
                f"step {step}: the state could not be written ({error}). {self.safe()} Make room, then --resume."
            ) from error
        self.accelerator.wait_for_everyone()

    def _drop_old(self) -> None:
        kept = self.kept()
        # before all losses have joined in, their sum is smaller and tells nothing
        whole = [step for step in kept if self.recipe.uses_diffusion_loss(step)] or list(kept)
        best = min(whole, key=lambda step: kept[step])
        for step in sorted(kept)[: -self.recipe.run.keep]:
            if step != best:
                shutil.rmtree(self._state(step), ignore_errors=True)

    def safe(self) -> str:
        """What is safe if the run stops now."""
        kept = self.kept()
        if not kept:
            return f"Nothing is saved yet in {self.out}."
        return f"The state after step {max(kept)} is safe in {self.states}."

    def log(self, step: int, losses: dict[str, float]) -> None:
        """Keeps a step's losses."""
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")
        self.accelerator.log(losses, step=step)

    def metrics(self) -> list[dict[str, float]]:
        """All steps' losses so far; a line that the power went off in is left out."""
        file = self.out / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = (_losses(line) for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
        return [line for line in lines if line is not None]

    def save_result(self, mapper: Mapper, adapted: PeftModel, llm_folder: Path, step: int) -> None:
        """Writes what the main job loads: `mapper.safetensors` and the PEFT folder `adapter/`."""
        save_adapter(adapted, llm_folder, self.out / "adapter")
        self.save_mapper(mapper, llm_folder, step)

    def save_mapper(self, mapper: Mapper, llm_folder: Path, step: int) -> None:
        """Writes `mapper.safetensors` alone, and the run's model card."""
        description = self.describe()
        trained = {
            "stage": self.recipe.stage,
            "steps": step,
            "seed": self.recipe.run.seed,
            "code": description["versions"]["minigpt5"],
            "data": self.data_name,
        }
        header = MapperHeader(
            mapper_space(self.recipe.model),
            llm_folder.name,
            mapper.config.llm_width,
            hash_weights(llm_folder),
            trained,
        )
        (self.out / "README.md").write_text(card(description, self.metrics()), encoding="utf-8")
        save_mapper(self.out / "mapper.safetensors", mapper, header)

    def preview(self, step: int, pictures: list[Image.Image]) -> None:
        """Lays pictures of fixed prompts side by side."""
        if not self.accelerator.is_main_process:
            return
        grid(pictures, 4).save(self.out / f"preview_{step:06d}.png")


def _mark(file: Path) -> tuple[int, float] | None:
    """The step of a saved state and the loss before it; None where the file is not what was written last."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        step, loss = found["step"], found["loss"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    fits = type(step) is int and file.parent.name == _name(step) and type(loss) in (int, float)
    return (step, float(loss)) if fits else None


def _losses(line: str) -> dict[str, float] | None:
    """A step's losses; None for a line that is not whole."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(found, dict) and all(type(value) in (int, float) for value in found.values())
    return found if numbers and type(found.get("step")) is int else None


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _project(tracker: str) -> str:
    """Under which name a tracker keeps the run; TensorBoard's is the folder in the run's own."""
    return "tensorboard" if tracker == "tensorboard" else "minigpt5"


def _flat(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a tracker can show: numbers and texts, by `table.key`; the rest as text."""
    return {
        f"{table}.{name}": value if isinstance(value, int | float | str) else str(value)
        for table, values in tables.items()
        for name, value in values.items()
    }
