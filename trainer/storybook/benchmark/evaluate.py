"""The benchmark: the same held-out stories illustrated in several ways, measured against the truth scene by scene.

python -m trainer evaluate --recipe trainer/recipes/storybook_evaluate.toml --out runs/evaluate
"""

import json
import random
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm_files import default_llm
from minigpt5_core.pipeline import DIFFUSION_PRECISIONS, STORYBOOK, Parts, StoryTeller, load
from minigpt5_core.weights import hash_weights, load_mapper

from ...common.provenance import fingerprint as data_fingerprint
from ...diffusion import check_picture_size
from ...evaluation.drawing import Drawing, Drawn
from ...evaluation.gallery import Gallery, draw_missing, fingerprint, write_stories
from ...evaluation.report import write_report
from ...evaluation.systems import chapters, held_records, score_systems, systems, true_pictures
from ...metrics.recipe import ScoresRecipe
from ..models.scorer import accuracy, load_scorer
from ..world.render import render
from ..world.stories import TrueScene, held_out_state, stories, training_state
from . import systems as rows
from .measure import features_of, measure, single_facts, summarise
from .systems import Row

ROWS = (
    "vokens", "vokens_reference", "two_stage", "two_stage_history", "two_stage_caption", "oracle",
)  # fmt: skip
SINGLE = ("vokens", "oracle")  # the rows that also draw single captions
SHEET = 10  # single captions to a strip


@dataclass(frozen=True)
class EvaluateRecipe:
    """Which stories, drawn how, in which ways. Empty paths stand for the storybook's own parts.

    `data` in a `format` is a data set to evaluate on in place of the storybook's world, in the ways that need no more
    than the main parts. There the LLM writes the texts itself, of at most `max_new_tokens`, unless `write` is false;
    `scores` says with which weights what comes out is measured.

    `diffusion_precision` and, on `data`, `picture_size` (pixels, 0: the diffusion model's own) are as in training.

    Settings are chosen on the `split` "validation": stories that no training draws, and captions, without held-out
    combinations.
    """

    stories: int = 100
    seed: int = 7
    split: str = "test"
    steps: int = 12
    guidance: float = 3.0
    captions: int = 200
    rows: tuple = ROWS
    feed_back: bool = True
    llm: str = ""
    adapter: str = ""
    mapper: str = ""
    diffusion: str = ""
    image_adapter: str = ""
    reference_mapper: str = "storybook/benchmark/reference_mapper.safetensors"
    caption_adapter: str = "storybook/benchmark/caption_adapter"
    scorer: str = "storybook/benchmark/scorer.safetensors"
    data: str = ""
    format: str = "jsonl"
    write: bool = True
    max_new_tokens: int = 60
    scores: ScoresRecipe = ScoresRecipe()
    diffusion_precision: str = "float32"
    picture_size: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in ROWS]:
            raise BadInputError(f"rows: unknown {', '.join(unknown)}. Known: {', '.join(ROWS)}.")
        if self.diffusion_precision not in DIFFUSION_PRECISIONS:
            raise BadInputError(
                f"diffusion_precision is {self.diffusion_precision!r}; it can be {' or '.join(DIFFUSION_PRECISIONS)}."
            )
        if self.picture_size and not self.data:
            raise BadInputError(
                f"picture_size is {self.picture_size}, but data is not set: the storybook's pictures are measured by a "
                "scorer of their own size. Leave picture_size out, or set data."
            )
        if self.split not in ("test", "validation"):
            raise BadInputError(f"split is {self.split!r}; it can be test or validation.")
        for name in ("stories", "steps", "captions"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}; it must be 1 or more.")


def evaluate(recipe: EvaluateRecipe, out: Path) -> dict:
    """Draws, measures, writes `report.json`, the report's page and `pictures/` into `out`; returns the report.

    Started by `torchrun`, each process draws its share of the stories. What an earlier, broken-off call drew
    with the same settings and weights is not drawn again.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    if recipe.data:
        return _evaluate_data(recipe, out, processes)
    told = list(islice(stories(recipe.seed, recipe.split), recipe.stories))
    singles = single_captions(recipe)
    teller = load_teller(recipe)
    ways = _rows(recipe, teller)
    galleries = {name: _gallery(recipe, out, name) for name in ways}
    alone = {name: _gallery(recipe, out, name, "captions") for name in ways if name in SINGLE}
    share = slice(processes.process_index, None, processes.num_processes)
    draw_missing(list(enumerate(told))[share], 1000 * recipe.seed, 1000, ways, galleries)
    single_ways = {name: way for name, way in rows.single(teller, _drawing(recipe)).items() if name in alone}
    draw_missing(list(enumerate(singles))[share], 1000 * recipe.seed, SHEET, single_ways, alone)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _report(recipe, out, told, singles, galleries, alone)
    processes.wait_for_everyone()
    return json.loads((out / "report.json").read_text())


def _evaluate_data(recipe: EvaluateRecipe, out: Path, processes: PartialState) -> dict:
    """The same on a data set."""
    records = held_records(Path(recipe.data), recipe.format, recipe.stories)
    teller = load_teller(recipe)
    stories = [chapters(teller, record) for record in records]
    sampling = Sampling(temperature=0.0, max_new_tokens=recipe.max_new_tokens)
    known = systems(teller, _drawing(recipe), sampling, recipe.write)
    ways = {name: way for name, way in known.items() if name in recipe.rows}
    if not ways:
        raise BadInputError(
            f"rows: {', '.join(recipe.rows)} need the storybook's world. On data: {', '.join(known)}."
        )
    galleries = {name: _gallery(recipe, out, name) for name in ways}
    share = slice(processes.process_index, None, processes.num_processes)
    draw_missing(list(enumerate(stories))[share], 1000 * recipe.seed, 1000, ways, galleries)
    processes.wait_for_everyone()
    if processes.is_main_process:
        drawn = {name: [gallery.load(n) for n in range(len(stories))] for name, gallery in galleries.items()}
        report = score_systems(stories, [record.id for record in records], drawn, recipe.scores)
        texts = [[chapter.scene.text for chapter in story] for story in stories]
        for number, story in enumerate(stories):
            side = next(one.picture.width for system in drawn.values() for one in system[number])
            Gallery(out / "pictures" / "true", "").save(number, true_pictures(story, side))
        for name, gallery in galleries.items():
            write_stories(out, name, [[one.text for one in story] for story in drawn[name]], gallery)
        report["settings"] = asdict(recipe) | {
            "data": Path(recipe.data).name,
            "scenes": sum(map(len, stories)),
        }
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        write_report(out, report, texts, [])
    processes.wait_for_everyone()
    return json.loads((out / "report.json").read_text())


def single_captions(recipe: EvaluateRecipe) -> list[list[TrueScene]]:
    """Captions by themselves, in sheets; in the split "test" all of held-out combinations."""
    draw = random.Random(f"single captions/{recipe.seed}")
    any_state = held_out_state if recipe.split == "test" else training_state
    states = [any_state(draw) for _ in range(recipe.captions)]
    scenes = [TrueScene(state.caption(), "", state, names_kind=True, names_prop=True) for state in states]
    return [scenes[first : first + SHEET] for first in range(0, len(scenes), SHEET)]


def load_teller(recipe: EvaluateRecipe) -> StoryTeller:
    """The recipe's main parts, checked against each other and against its picture size."""
    teller = load(
        Parts(
            _path(recipe.llm),
            _path(recipe.adapter),
            _path(recipe.mapper),
            _path(recipe.diffusion),
            image_adapter=_path(recipe.image_adapter),
            diffusion_precision=recipe.diffusion_precision,
        )
    )
    check_picture_size(teller.diffusion, recipe.picture_size)
    return teller


def _drawing(recipe: EvaluateRecipe) -> Drawing:
    return Drawing(recipe.steps, recipe.guidance, recipe.picture_size)


def _path(value: str) -> Path | None:
    return Path(value) if value else None


def _rows(recipe: EvaluateRecipe, teller: StoryTeller) -> dict[str, Row]:
    """The ways that were asked for; one whose weights are missing is left out, and the way to them is said."""
    needed = {
        "vokens_reference": (recipe.reference_mapper, "python -m trainer mapper --set mapper=reference"),
        "two_stage_caption": (recipe.caption_adapter, "python -m trainer caption-adapter"),
    }
    absent = {name for name, (path, _) in needed.items() if name in recipe.rows and not Path(path).exists()}
    for name in sorted(absent):
        path, command = needed[name]
        print(f"row {name} is left out: there is nothing at {path}. It is made by {command}")
    drawing = _drawing(recipe)
    ways = {
        "vokens": lambda: rows.vokens(teller, drawing, feed_back=recipe.feed_back),
        "vokens_reference": lambda: rows.vokens(
            teller, drawing, load_mapper(Path(recipe.reference_mapper))[0], recipe.feed_back
        ),
        "two_stage": lambda: rows.two_stage(teller, drawing, rows.sentences),
        "two_stage_history": lambda: rows.two_stage(teller, drawing, rows.histories),
        "two_stage_caption": lambda: rows.captioned(teller, drawing, _captioning_llm(recipe)),
        "oracle": lambda: rows.two_stage(teller, drawing, rows.true_captions),
    }
    return {name: ways[name]() for name in recipe.rows if name not in absent}


def _captioning_llm(recipe: EvaluateRecipe) -> FrozenLLM:
    """The LLM with the rival's adapter, which PEFT reads: it holds no voken rows."""
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_llm(folder)
    adapted = PeftModel.from_pretrained(llm.causal_lm, recipe.caption_adapter)
    llm.causal_lm = adapted.merge_and_unload().eval()
    return llm


def _gallery(recipe: EvaluateRecipe, out: Path, name: str, below: str = "") -> Gallery:
    """Where a row's pictures lie; what they were drawn with are all parts, and the row's own."""
    told = (
        "seed", "split", "steps", "guidance", "feed_back", "data", "format", "write", "max_new_tokens",
        "diffusion_precision", "picture_size",
    )  # fmt: skip
    settings = {key: getattr(recipe, key) for key in told}
    parts = [
        _path(recipe.mapper) or STORYBOOK / "voken_mappers",
        _path(recipe.adapter) or STORYBOOK / "loras",
        _path(recipe.diffusion) or STORYBOOK / "diffusers",
        _path(recipe.image_adapter) or STORYBOOK / "LLM",
    ]
    if recipe.data:
        settings["data"] = data_fingerprint(Path(recipe.data))
    settings["llm"] = hash_weights(_path(recipe.llm) or default_llm())
    own = {"vokens_reference": recipe.reference_mapper, "two_stage_caption": recipe.caption_adapter}
    if name in own:
        parts.append(Path(own[name]))
    return Gallery(out / "pictures" / below / name, fingerprint(settings, parts))


def _report(
    recipe: EvaluateRecipe,
    out: Path,
    told: list[list[TrueScene]],
    singles: list[list[TrueScene]],
    galleries: dict[str, Gallery],
    alone: dict[str, Gallery],
) -> None:
    """Measures what was drawn and writes the report."""
    scorer = load_scorer(Path(recipe.scorer))
    true = [_true_pictures(recipe, number, story) for number, story in enumerate(told)]
    for number, pictures in enumerate(true):
        Gallery(out / "pictures" / "true", "").save(number, [Drawn(picture, 0, 0.0) for picture in pictures])
    true_features = features_of(scorer, [picture for story in true for picture in story])
    measured = {
        name: measure(scorer, told, [gallery.load(number) for number in range(len(told))], true_features)
        for name, gallery in galleries.items()
    }
    right = {
        name: single_facts(scorer, singles, [gallery.load(number) for number in range(len(singles))])
        for name, gallery in alone.items()
    }
    report = summarise(told, measured, true_features, right)
    report["settings"] = asdict(recipe) | {
        "scenes": sum(map(len, told)),
        "scorer_accuracy": accuracy(scorer, 500, seed=recipe.seed + 1),
    }
    texts = [[scene.text for scene in story] for story in told]
    for name, gallery in galleries.items():
        write_stories(out, name, texts, gallery)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_report(out, report, texts, [scene.caption for scene in singles[0]])


def _true_pictures(recipe: EvaluateRecipe, number: int, story: list[TrueScene]) -> list[Image.Image]:
    return [
        render(scene.state, random.Random(f"true/{recipe.seed}/{number}/{index}"))
        for index, scene in enumerate(story)
    ]
