"""The evaluation on any data set: systems go on with its stories, and are scored against what comes next.

    python -m trainer evaluate --data FILE --format jsonl --out runs/evaluate

What every evaluation shares, the storybook's benchmark too, is here as well: the recipe's common part, the loaded
models, where a system's pictures lie, and the report that one process writes for all.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState

from minigpt5_core.diffusion import DIFFUSION_PRECISIONS
from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling
from minigpt5_core.llm.files import default_llm
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.pipeline import STORYBOOK, Parts, StoryTeller, load

from ..common.provenance import fingerprint as data_fingerprint
from ..data.records import Record
from ..diffusion import check_picture_size
from ..metrics.recipe import ScoresRecipe
from .chapters import Chapter, chapters, held_records, true_pictures
from .drawing import DrawnScene, DrawSettings
from .gallery import Gallery, draw_missing, fingerprint, true_gallery, write_stories
from .report import write_report
from .systems import SYSTEMS, build_systems
from .table import score_systems

DRAWN_WITH = (
    "seed", "steps", "guidance", "data", "format", "write", "max_new_tokens", "diffusion_precision", "picture_size",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateRecipe:
    """Which stories, illustrated by which systems and drawn how. Empty paths stand for the storybook's own parts.

    `data` in a `format` is the data set. The LLM writes the texts itself, of at most `max_new_tokens`, unless `write`
    is false; `scores` says with which weights what comes out is measured.

    `diffusion_precision` and `picture_size` (pixels, 0: the diffusion model's own) are as in training.
    """

    FORMER: ClassVar[dict[str, str]] = {"rows": "systems"}

    stories: int = 100
    seed: int = 7
    steps: int = 12
    guidance: float = 3.0
    systems: tuple = SYSTEMS
    llm: str = ""
    adapter: str = ""
    mapper: str = ""
    diffusion: str = ""
    image_adapter: str = ""
    data: str = ""
    format: str = "jsonl"
    write: bool = True
    max_new_tokens: int = 60
    scores: ScoresRecipe = ScoresRecipe()
    diffusion_precision: str = "float32"
    picture_size: int = 0

    def __post_init__(self) -> None:
        self._check_systems()
        if self.diffusion_precision not in DIFFUSION_PRECISIONS:
            raise BadInputError(
                f"diffusion_precision is {self.diffusion_precision!r}; it can be {' or '.join(DIFFUSION_PRECISIONS)}."
            )
        for name in ("stories", "steps"):
            self._check_count(name)

    def _check_systems(self) -> None:
        check_systems(self.systems, SYSTEMS)

    def _check_count(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise BadInputError(f"{name} is {getattr(self, name)}; it must be 1 or more.")


def check_systems(names: Sequence[str], known: Sequence[str], note: str = "") -> None:
    """BadInputError, which ends with `note`, for a system that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise BadInputError(f"systems: unknown {', '.join(unknown)}. Known: {', '.join(known)}.{note}")


def evaluate(recipe: EvaluateRecipe, out: Path) -> dict:
    """Draws, measures, writes `report.json`, the report's page and `pictures/` into `out`; returns the report.

    Started by `torchrun`, each process draws its share of the stories. What an earlier, broken-off call drew
    with the same settings and weights is not drawn again. BadInputError for no data, or none that can be used.
    """
    if not recipe.data:
        raise BadInputError(
            "data is not set. Give the data set's file or folder: --data PATH --format FORMAT."
        )
    if recipe.format == "captions" and recipe.write:
        raise BadInputError(
            f"{recipe.data} holds captions, and no story to go on with. Set write=false: each caption is then "
            "given, and its picture drawn."
        )
    processes = start_processes()
    records = held_records(Path(recipe.data), recipe.format, recipe.stories)
    teller = load_teller(recipe)
    stories = [chapters(teller, record) for record in records]
    sampling = Sampling(temperature=0.0, max_new_tokens=recipe.max_new_tokens)
    systems = build_systems(recipe.systems, teller, draw_settings(recipe), sampling, recipe.write)
    galleries = {name: open_gallery(recipe, out / "pictures" / name) for name in systems}
    draw_missing(processes, stories, recipe.seed, systems, galleries)
    return report_once(processes, out, lambda: _report(recipe, out, records, stories, galleries))


def _report(
    recipe: EvaluateRecipe,
    out: Path,
    records: list[Record],
    stories: list[list[Chapter]],
    galleries: dict[str, Gallery],
) -> None:
    """Scores what was drawn and writes the report."""
    drawn = {name: gallery.load_all(len(stories)) for name, gallery in galleries.items()}
    report = score_systems(stories, [record.id for record in records], drawn, recipe.scores)
    report["settings"] = report_settings(recipe) | {
        "data": Path(recipe.data).name,
        "scenes": sum(map(len, stories)),
    }
    _save_true_pictures(out, stories, drawn)
    for name, gallery in galleries.items():
        write_stories(out, name, [[scene.text for scene in story] for story in drawn[name]], gallery)
    texts = [[chapter.scene.text for chapter in story] for story in stories]
    write_report(out, report, _introduction(report["settings"]), texts)


def _save_true_pictures(
    out: Path, stories: list[list[Chapter]], drawn: dict[str, list[list[DrawnScene]]]
) -> None:
    """Each story's true pictures, as large as those that were drawn."""
    for number, story in enumerate(stories):
        side = next(scene.picture.width for system in drawn.values() for scene in system[number])
        true_gallery(out).save(number, [DrawnScene(picture) for picture in true_pictures(story, side)])


def _introduction(settings: dict) -> str:
    """What was measured, in a sentence or two."""
    written = "The LLM wrote the texts." if settings["write"] else "The true texts were given to every row."
    return (
        f"{settings['stories']} stories of {settings['data']}, {settings['scenes']} scenes in all, "
        f"{settings['steps']} steps, guidance {settings['guidance']:g}. {written}"
    )


def start_processes() -> PartialState:
    """The processes of this evaluation, one or as many as `torchrun` has started, on GPUs where there are some."""
    return PartialState(cpu=not torch.cuda.is_available())


def report_once(processes: PartialState, out: Path, write: Callable[[], None]) -> dict:
    """When all processes have drawn, one of them writes the report; every one returns what is in `report.json`."""
    processes.wait_for_everyone()
    if processes.is_main_process:
        write()
    processes.wait_for_everyone()
    return json.loads((out / "report.json").read_text())


def report_settings(recipe: EvaluateRecipe) -> dict:
    """The recipe as `report.json` holds it, where systems are called rows."""
    return {"rows" if name == "systems" else name: value for name, value in asdict(recipe).items()}


def load_teller(recipe: EvaluateRecipe) -> StoryTeller:
    """The recipe's main parts, checked against each other and against its picture size."""
    teller = load(
        Parts(
            path_or_none(recipe.llm),
            path_or_none(recipe.adapter),
            path_or_none(recipe.mapper),
            path_or_none(recipe.diffusion),
            image_adapter=path_or_none(recipe.image_adapter),
            diffusion_precision=recipe.diffusion_precision,
        )
    )
    check_picture_size(teller.diffusion, recipe.picture_size)
    return teller


def draw_settings(recipe: EvaluateRecipe) -> DrawSettings:
    """How the recipe's pictures are drawn."""
    return DrawSettings(recipe.steps, recipe.guidance, recipe.picture_size)


def path_or_none(value: str) -> Path | None:
    """A recipe's path; None for an empty one."""
    return Path(value) if value else None


def open_gallery(
    recipe: EvaluateRecipe, folder: Path, drawn_with: Iterable[str] = DRAWN_WITH, weights: Iterable[Path] = ()
) -> Gallery:
    """A system's pictures in `folder`, drawn with the recipe's main parts and the system's own `weights`.

    `drawn_with` names what else in the recipe decides how they come out.
    """
    settings = {key: getattr(recipe, key) for key in drawn_with}
    if recipe.data:
        settings["data"] = data_fingerprint(Path(recipe.data))
    settings["llm"] = hash_weights(path_or_none(recipe.llm) or default_llm())
    parts = [
        path_or_none(recipe.mapper) or STORYBOOK / "voken_mappers",
        path_or_none(recipe.adapter) or STORYBOOK / "loras",
        path_or_none(recipe.diffusion) or STORYBOOK / "diffusers",
        path_or_none(recipe.image_adapter) or STORYBOOK / "LLM",
    ]
    return Gallery(folder, fingerprint(settings, [*parts, *weights]))
