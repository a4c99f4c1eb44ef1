"""The benchmark: the same held-out stories illustrated in several ways, measured against the truth scene by scene.

python -m trainer evaluate --recipe trainer/recipes/storybook_evaluate.toml --out runs/evaluate
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm_files import default_llm
from minigpt5_core.metrics import Interval, bootstrap, bootstrap_difference, frechet_distance
from minigpt5_core.pipeline import Parts, StoryTeller, load
from minigpt5_core.weights import load_mapper

from .progress import Progress, grid
from .report import write_report
from .storybook import rows
from .storybook.autoencoder import to_tensor
from .storybook.identity import identity
from .storybook.render import render
from .storybook.rows import Drawing, Drawn, Row
from .storybook.scorer import Scorer, accuracy, load_scorer
from .storybook.stories import TrueScene, held_out_state, stories
from .storybook.world import FACTS, State

COLUMNS = (
    "hero", "prop", "place", "time", "hero_named", "hero_unnamed", "prop_named", "prop_carried", "consistency",
    "identity", "image_similarity", "fid", "seconds_per_scene", "llm_tokens_per_scene",
    "caption_hero", "caption_prop", "caption_place", "caption_time",
)  # fmt: skip
LEAST_FOR_FID = 400  # pictures a side
ROWS = (
    "vokens", "vokens_reference", "vokens_consistent", "two_stage", "two_stage_history", "two_stage_caption", "oracle",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateRecipe:
    """Which stories, drawn how, in which ways. Empty paths stand for the storybook's own parts."""

    stories: int = 100
    seed: int = 7
    steps: int = 20
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
    scorer: str = "storybook/scorer.safetensors"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in ROWS]:
            raise BadInputError(f"rows: unknown {', '.join(unknown)}. Known: {', '.join(ROWS)}.")
        for name in ("stories", "steps", "captions"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}; it must be 1 or more.")


@dataclass(frozen=True)
class Measured:
    """What a row's pictures came to: values by column, one a scene, NaN where undefined; features (N, D)."""

    values: dict[str, np.ndarray]
    features: np.ndarray


def evaluate(recipe: EvaluateRecipe, out: Path) -> dict:
    """Draws, measures, writes `report.json`, `report.html` and `pictures/` into `out`; returns the report."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    teller = load(
        Parts(
            _path(recipe.llm),
            _path(recipe.adapter),
            _path(recipe.mapper),
            _path(recipe.diffusion),
            image_adapter=_path(recipe.image_adapter),
        )
    )
    scorer = load_scorer(Path(recipe.scorer))
    told = list(islice(stories(recipe.seed, "test"), recipe.stories))
    true = [[render(s.state, random.Random(f"true/{recipe.seed}/{n}/{i}")) for i, s in enumerate(story)]
            for n, story in enumerate(told)]  # fmt: skip
    _save_strips(out, "true", true)
    true_features = _features(scorer, [picture for story in true for picture in story])
    measured = {}
    for name, row in _rows(recipe, teller).items():
        drawn = _draw(name, row, told, recipe.seed)
        _save_strips(out, name, [[scene.picture for scene in story] for story in drawn])
        measured[name] = measure(scorer, told, drawn, true_features)
    singles = _single_captions(recipe, teller, scorer)
    report = summarise(recipe, told, measured, true_features, singles)
    report["settings"]["scorer_accuracy"] = accuracy(scorer, 500, seed=recipe.seed + 1)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_report(out, report, told)
    return report


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
    drawing = Drawing(recipe.steps, recipe.guidance)
    ways = {
        "vokens": lambda: rows.vokens(teller, drawing, feed_back=recipe.feed_back),
        "vokens_reference": lambda: rows.vokens(
            teller, drawing, load_mapper(Path(recipe.reference_mapper))[0], recipe.feed_back
        ),
        "vokens_consistent": lambda: rows.vokens(
            teller, drawing, feed_back=recipe.feed_back, consistent=True
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


def _draw(name: str, row: Row, told: list[list[TrueScene]], seed: int) -> list[list[Drawn]]:
    print(f"row {name}")
    progress = Progress(len(told))
    drawn = []
    for number, story in enumerate(told):
        drawn.append(list(row(story, 1000 * (seed + number))))
        progress.update(number + 1, len(story))
    return drawn


def measure(
    scorer: Scorer, told: list[list[TrueScene]], drawn: list[list[Drawn]], true_features: np.ndarray
) -> Measured:
    """Every column that has a value for each scene."""
    scenes = [scene for story in told for scene in story]
    flat = [scene for story in drawn for scene in story]
    pictures = [scene.picture for scene in flat]
    seen, features = scorer.read(pictures), _features(scorer, pictures)
    states = [scene.state for scene in scenes]
    right = {name: _right(states, seen, name) for name in FACTS}
    named = np.array([scene.names_kind for scene in scenes])
    prop_named = np.array([scene.names_prop for scene in scenes])
    carried = np.array([scene.state.prop is not None and not scene.names_prop for scene in scenes])
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(true_features, axis=1)
    values = right | {
        "hero_named": np.where(named, right["hero"], np.nan),
        "hero_unnamed": np.where(named, np.nan, right["hero"]),
        "prop_named": np.where(prop_named, right["prop"], np.nan),
        "prop_carried": np.where(carried, right["prop"], np.nan),
        "consistency": _consistency([len(story) for story in told], seen),
        "identity": _identities(told, pictures, seen),
        "image_similarity": (features * true_features).sum(1) / lengths,
        "seconds_per_scene": np.array([scene.seconds for scene in flat]),
        "llm_tokens_per_scene": np.array([float(scene.llm_tokens) for scene in flat]),
    }
    return Measured(values, features)


def _right(true: Sequence[State], seen: Sequence[State], fact: str) -> np.ndarray:
    """1 where the scorer reads the true fact, else 0."""
    return np.array([float(getattr(a, fact) == getattr(b, fact)) for a, b in zip(true, seen, strict=True)])


def _consistency(lengths: Sequence[int], seen: Sequence[State]) -> np.ndarray:
    """For each later scene, whether its picture shows the hero that the story's first picture shows."""
    same = []
    start = 0
    for length in lengths:
        heroes = [state.hero for state in seen[start : start + length]]
        same += [np.nan, *(float(hero == heroes[0]) for hero in heroes[1:])]
        start += length
    return np.array(same)


def _identities(
    told: list[list[TrueScene]], pictures: Sequence[Image.Image], seen: Sequence[State]
) -> np.ndarray:
    """Likeness of each story's hero to its first appearance."""
    values: list[float] = []
    for story in told:
        part = slice(len(values), len(values) + len(story))
        hero = story[0].state.hero
        values += identity(pictures[part], hero, [state.hero == hero for state in seen[part]])
    return np.array(values)


@torch.no_grad()
def _features(scorer: Scorer, pictures: list[Image.Image]) -> np.ndarray:
    parts = [pictures[first : first + 64] for first in range(0, len(pictures), 64)]
    return torch.cat([scorer.features(to_tensor(part)) for part in parts]).double().numpy()


def _single_captions(
    recipe: EvaluateRecipe, teller: StoryTeller, scorer: Scorer
) -> dict[str, dict[str, np.ndarray]]:
    """Captions by themselves, all of held-out combinations: vokens beside the text encoder."""
    drawing = Drawing(recipe.steps, recipe.guidance)
    draw = random.Random(f"single captions/{recipe.seed}")
    states = [held_out_state(draw) for _ in range(recipe.captions)]
    pictures: dict[str, list[Image.Image]] = {"vokens": [], "oracle": []}
    progress = Progress(len(states))
    print("single captions")
    for number, state in enumerate(states):
        answer = teller.mapper(rows.caption_states(teller.llm, state.caption()))
        seed = 1000 * recipe.seed + number
        pictures["vokens"].append(
            rows.draw_conditioning(teller, drawing, answer, teller.mapper.negative(), seed)
        )
        pictures["oracle"].append(rows.draw_prompt(teller, drawing, state.caption(), seed))
        progress.update(number + 1, 2)
    seen = {name: scorer.read(drawn) for name, drawn in pictures.items()}
    return {
        name: {f"caption_{fact}": _right(states, read, fact) for fact in FACTS} for name, read in seen.items()
    }


def summarise(
    recipe: EvaluateRecipe,
    told: list[list[TrueScene]],
    measured: dict[str, Measured],
    true_features: np.ndarray,
    singles: dict[str, dict[str, np.ndarray]],
) -> dict:
    """The report: every column of every row with its interval, and the differences between rows."""
    groups = np.repeat(np.arange(len(told)), [len(story) for story in told])
    table: dict[str, dict] = {}
    for name, row in measured.items():
        cells = {column: _cell(bootstrap(values, groups)) for column, values in row.values.items()}
        cells["fid"] = _cell(_fid(row.features, true_features, groups))
        alone = singles.get(name, {})
        cells |= {
            column: _cell(bootstrap(values, np.arange(len(values)))) for column, values in alone.items()
        }
        table[name] = {column: cells.get(column) for column in COLUMNS}
    differences: dict[str, dict] = {}
    for first, second in combinations(measured, 2):
        pairs = {
            column: (values, measured[second].values[column])
            for column, values in measured[first].values.items()
        }
        cells = {column: _cell(bootstrap_difference(*pair, groups)) for column, pair in pairs.items()}
        for column in singles.get(first, {}).keys() & singles.get(second, {}).keys():
            one, other = singles[first][column], singles[second][column]
            cells[column] = _cell(bootstrap_difference(one, other, np.arange(len(one))))
        differences[f"{first}-{second}"] = {column: cells.get(column) for column in COLUMNS}
    settings = asdict(recipe) | {"scenes": len(groups)}
    return {"rows": table, "differences": differences, "settings": settings}


def _cell(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {name: round(value, 5) for name, value in asdict(interval).items()}


def _fid(features: np.ndarray, true: np.ndarray, groups: np.ndarray, draws: int = 100) -> Interval | None:
    """Frechet distance to the true pictures, whole stories drawn for the interval; None for too few pictures."""
    if len(features) < LEAST_FOR_FID:
        return None
    chance = np.random.default_rng(0)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values = []
    for _ in range(draws):
        picked = np.concatenate([members[index] for index in chance.integers(0, len(members), len(members))])
        values.append(frechet_distance(features[picked], true[picked]))
    low, middle, high = np.percentile(values, (2.5, 50, 97.5))
    whole = frechet_distance(features, true)
    # stories drawn twice raise the distance: of the drawn ones only the spread is taken
    return Interval(whole, float(whole + low - middle), float(whole + high - middle))


def _save_strips(out: Path, name: str, pictures: list[list[Image.Image]]) -> None:
    """One strip of pictures a story."""
    folder = out / "pictures" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, strip in enumerate(pictures):
        grid(strip, len(strip)).save(folder / f"story_{number:03}.png")
