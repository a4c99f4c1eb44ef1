"""Train a voken mapper in the graph: for whatever text encoder a CLIP socket holds, from texts alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io

from . import folders
from .compat import schema
from .preview import tell_user
from .sockets import LLM, LOSS_MAP, MAPPER, LoadedLLM, LoadedMapper
from .text_encoder import CAPTION, TextEncoder
from .turn import SEEDS, cache_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..minigpt5_core.conditioning import Space
    from ..minigpt5_core.conditioning.fit import FitSettings, Fitted, Targets
    from ..minigpt5_core.story.captioned import CaptionedStory

log = logging.getLogger("minigpt5")

FILES = (".txt", ".jsonl", ".gz")
SUFFIX = ".safetensors"
WINDOW = 64  # stories that are sorted by length before they are read
EVERY = 1.0  # seconds between texts on the node


class TrainMapper(io.ComfyNode):
    """LLM and CLIP in, a mapper between them out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5TrainMapper",
            display_name="Train Voken Mapper (MiniGPT-5)",
            category="MiniGPT-5/training",
            description="Teaches the LLM's vokens to say what a checkpoint's own text encoder would answer to a "
            "caption, from texts alone: no pictures, minutes. The mapper is saved in models/voken_mappers.",
            search_aliases=["train", "fit", "mapper", "checkpoint", "projector"],
            is_experimental=True,
            is_output_node=True,
            inputs=[
                LLM.Input(
                    "llm", display_name="LLM", tooltip="The one that will tell, with Load Adapter behind it."
                ),
                io.Clip.Input(
                    "clip",
                    display_name="CLIP",
                    tooltip="Of the checkpoint that will draw: SD 1.5, SD 2.x, SDXL, SD3, Flux or a finetune of one. "
                    "What it answers to a caption is learned, clip skip included.",
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    default="",
                    tooltip="Empty: the storybook's own stories. Else a line a caption; or stories, a line a scene, "
                    "'text | caption', with an empty line behind each; or the name of such a file in ComfyUI's input "
                    "folder.",
                ),
                io.String.Input(
                    "style",
                    multiline=True,
                    default=CAPTION,
                    tooltip="What CLIP is given, with {caption} in the caption's place: 'watercolor picture book "
                    "illustration of {caption}, soft light'.",
                ),
                io.String.Input(
                    "name",
                    default="my_mapper",
                    tooltip="The file's name in models/voken_mappers. One that is there is never written over: the new "
                    "one gets a number.",
                ),
                io.Int.Input(
                    "steps", default=3000, min=2, max=1_000_000, tooltip="More learn more, and take longer."
                ),
                io.Int.Input("batch", default=16, min=1, max=1024, tooltip="Scenes in a step."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    tooltip="The highest; it rises to it over the first steps and falls behind.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS,
                    control_after_generate=False,
                    tooltip="The same seed on the same machine gives the same mapper.",
                ),
                io.Int.Input(
                    "scenes",
                    default=2000,
                    min=1,
                    max=20_000,
                    tooltip="The most captions that are read, from the first on. Fewer begin sooner and know less.",
                ),
                MAPPER.Input(
                    "mapper",
                    optional=True,
                    tooltip="An earlier mapper to go on with, of the same kind of CLIP; without, a new one.",
                ),
            ],
            outputs=[
                MAPPER.Output("trained_mapper", display_name="mapper"),
                LOSS_MAP.Output("losses", display_name="loss"),
                io.Int.Output("trained_steps", display_name="steps"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, texts: str | None = None, style: str | None = None, name: str | None = None
    ) -> bool | str:
        for check, value in ((_file_of, texts), (_check_style, style), (_check_name, name)):
            if value is not None and (said := folders.problem(check, value)) is not True:
                return said
        return True

    @classmethod
    def fingerprint_inputs(cls, texts: str | None = None, **others: Any) -> str:
        return folders.fingerprint(_file_of(texts or ""))

    @classmethod
    def execute(
        cls,
        llm: LoadedLLM,
        clip: Any,
        texts: str,
        style: str,
        name: str,
        steps: int,
        batch: int,
        learning_rate: float,
        seed: int,
        scenes: int,
        mapper: LoadedMapper | None = None,
    ) -> io.NodeOutput:
        from ..minigpt5_core.conditioning.fit import FitSettings

        _check_style(style)
        _check_name(name)
        settings = FitSettings(steps, batch, learning_rate, seed & (2**63 - 1))
        stories = _first(_stories(texts), scenes)
        report = _Report(stories, steps, cls.hidden.unique_id)
        encoder = TextEncoder(clip, style, mapper)
        encoder.check(llm, mapper)
        states, captions = _voken_states(llm, stories, report)
        states, rows, targets = encoder.targets(states, captions, report.tick)
        fitted, stopped = _fit(states, targets, rows, settings, mapper, report)
        before = int(mapper.header.trained.get("steps", 0)) if mapper else 0
        total = before + len(fitted.losses)
        trained = {
            "stage": "mapper in ComfyUI",
            "steps": total,
            "seed": seed,
            "data": "texts" if texts.strip() else "storybook",
            "style": style,
            "scenes": len(states),
        }
        loaded, said = _save(name, fitted, encoder.space, llm, trained)
        done = f"Stopped after {len(fitted.losses)} of {steps} steps" if stopped else f"{steps} steps"
        message = f"{done}, loss {_recent(fitted.losses):.3f}. {said}"
        log.info(message)
        report.say(message)
        if stopped is not None:
            raise stopped
        return io.NodeOutput(loaded, {"loss": fitted.losses}, total, ui={"text": [message]})


class _Report:
    """Progress on the node: its bar, which raises when the user has pressed Cancel, and a line of text."""

    def __init__(self, stories: list[CaptionedStory], steps: int, node_id: str | None) -> None:
        import comfy.utils

        self.stories, self.node_id, self.told = len(stories), node_id, 0.0
        self.captions = len({scene.caption for story in stories for scene in story if scene.caption})
        self.bar = comfy.utils.ProgressBar(self.stories + self.captions + steps)

    def tick(self, text: str) -> None:
        """One thing more is done; the text is shown about once a second."""
        import comfy.model_management as management

        self.bar.update(1)
        management.throw_exception_if_processing_interrupted()  # a long bar looks at every 200th tick only
        if time.monotonic() - self.told > EVERY:
            self.say(text)

    def say(self, text: str) -> None:
        """Shows a text now."""
        self.told = time.monotonic()
        tell_user(text, self.node_id)


# Texts


def _check_style(style: str) -> None:
    if CAPTION not in style:
        raise ValueError(
            f"style is {style!r:.200}, without {CAPTION}. Write {CAPTION} where each caption belongs, such as: "
            f"watercolor of {CAPTION}, soft light. {CAPTION} alone is no style."
        )


def _file_of(texts: str) -> Path | None:
    """The file that is named, the storybook's for empty texts, None for texts that stand in the widget."""
    from ..minigpt5_core.errors import BadInputError
    from ..minigpt5_core.inside import named_file
    from ..minigpt5_core.story.captioned import CAPTIONED

    line = texts.strip()
    if not line:
        return folders.STORYBOOK / CAPTIONED
    if "\n" in line or not line.lower().endswith(FILES):
        return None
    try:
        path = named_file(Path(folder_paths.get_input_directory()), line)
    except BadInputError as error:
        raise ValueError(f"texts: {error}.") from error
    if not path.is_file():
        raise ValueError(
            f"texts is {line!r:.200}, the name of a file, and there is none in {path.parent}. Put it there, or write "
            "captions, a line each."
        )
    return path


def _stories(texts: str) -> Iterator[CaptionedStory]:
    from ..minigpt5_core.story.captioned import open_captioned, read_captioned

    file = _file_of(texts)
    return read_captioned(open_captioned(file) if file else texts.splitlines())


def _first(stories: Iterable[CaptionedStory], most: int) -> list[CaptionedStory]:
    """The first stories with so many captions; a line more is not read."""
    kept: list[CaptionedStory] = []
    room = most
    for story in stories:
        captions = sum(bool(scene.caption) for scene in story)
        if not captions:
            continue
        kept.append(story)
        room -= captions
        if room <= 0:
            break
    if not kept:
        raise ValueError(
            "The texts hold no caption. Write captions, a line each; or stories, a line a scene: text | caption. Empty "
            "texts take the storybook's own stories."
        )
    return kept


# Voken states


def _voken_states(llm: LoadedLLM, stories: list[CaptionedStory], report: _Report) -> tuple[Tensor, list[str]]:
    """(N, V, L) in half precision, and the N captions they belong to."""
    import comfy.model_management as management
    import torch

    from ..minigpt5_core.story.states import READ_AT_ONCE, read_voken_states

    memory = cache_bytes(llm, READ_AT_ONCE)
    management.load_models_gpu(llm.patchers, memory_required=memory, force_full_load=True)
    states: list[Tensor] = []
    captions: list[str] = []
    waiting, read = iter(stories), 0
    while window := list(islice(waiting, WINDOW)):
        found: dict[int, Tensor] = {}
        for index, known in read_voken_states(llm.frozen, window):
            found[index], read = known, read + 1
            report.tick(f"The LLM reads: {read} of {len(stories)}")
        for index, story in enumerate(window):
            shown = [scene.caption for scene in story if scene.caption]
            states.append(found[index].half())
            captions += shown[: len(found[index])]
    if not captions:
        raise ValueError(
            f"Not one of the texts fits into what {llm.name} can read, {llm.frozen.context} tokens. Write shorter ones."
        )
    return torch.cat(states), captions


# Fitting and saving


def _fit(
    states: Tensor,
    targets: Targets,
    rows: list[int],
    settings: FitSettings,
    mapper: LoadedMapper | None,
    report: _Report,
) -> tuple[Fitted, BaseException | None]:
    """The fitted mapper; and what ComfyUI raised when the user pressed Cancel, or None."""
    import comfy.model_management as management
    import torch

    from ..minigpt5_core.conditioning.fit import fit_mapper, memory_of_fit

    device = management.get_torch_device()
    management.free_memory(memory_of_fit(targets, settings), device)  # LLM and CLIP are not needed any more
    stopped: list[BaseException] = []
    began = time.monotonic()

    def on_step(step: int, loss: float) -> bool:
        left = (settings.steps - step) * (time.monotonic() - began) / step
        try:
            report.tick(f"Step {step} of {settings.steps}, loss {loss:.3f}, {_minutes(left)} left")
        except BaseException as cancel:  # ComfyUI's own is none of Exception's
            stopped.append(cancel)
        return bool(stopped)

    with torch.inference_mode(False), torch.enable_grad(), _in_training():
        start = mapper.mapper if mapper else None
        states = states.clone()  # made in inference mode, which nothing is learned from
        fitted = fit_mapper(states, targets, settings, rows=rows, start=start, on_step=on_step, device=device)
    return fitted, stopped[0] if stopped else None


@contextmanager
def _in_training() -> Iterator[None]:
    """Tells the host, where it wants to know, as its own training nodes do."""
    import comfy.model_management as management

    if not hasattr(management, "in_training"):
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = False


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _recent(losses: list[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _check_name(name: str) -> None:
    """ValueError for a name that is no plain file name on any system."""
    stem = name.strip().removesuffix(SUFFIX)
    if (
        not stem
        or stem.startswith(".")
        or stem.endswith(".")
        or set(stem) & set('/\\:*?"<>|')
        or len(stem) > 100
    ):
        raise ValueError(
            f"name is {name!r:.200}. Give a plain name without a path, such as my_mapper: the mapper is saved in "
            "models/voken_mappers under it."
        )
    if not stem.isprintable():
        raise ValueError("name holds characters that cannot be seen. Type a plain name.")


def _free_file(name: str) -> Path:
    """Where the mapper is saved: a name that nobody has, in any of the folders that mappers are found in."""
    stem = name.strip().removesuffix(SUFFIX)
    names = (f"{stem}_{number}{SUFFIX}" if number > 1 else stem + SUFFIX for number in count(1))
    places = [Path(place) for place in folder_paths.get_folder_paths("voken_mappers")]
    free = next(one for one in names if not any((place / one).exists() for place in places))
    return places[0] / free


def _save(
    name: str, fitted: Fitted, space: Space, llm: LoadedLLM, trained: dict[str, Any]
) -> tuple[LoadedMapper, str]:
    """The mapper with its header, and where it was saved; on a full disk it lives on in the graph alone."""
    from safetensors import SafetensorError

    from ..minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper

    file = _free_file(name)
    header = MapperHeader(space, llm.name, llm.frozen.width, llm.weights_hash, trained)
    loaded = LoadedMapper(fitted.mapper, header, file.name)
    try:
        save_mapper(file, fitted.mapper, header)
    except (OSError, SafetensorError) as error:
        said = f"It could NOT be saved as {file}: {error}. It works until ComfyUI ends."
        log.error(said)
        return loaded, said
    return loaded, f"Saved as models/voken_mappers/{file.name}; press R to find it in Load Voken Mapper."
