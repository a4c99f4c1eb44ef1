"""The benchmark: the same held-out stories illustrated by several systems, measured against the truth scene by scene.

python -m trainer evaluate --recipe trainer/recipes/storybook_evaluate.toml --out runs/evaluate
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from peft import PeftModel
from PIL import Image

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.pipeline import StoryTeller

from ...evaluation.drawing import DrawnScene, System
from ...evaluation.evaluate import (
    DRAWN_WITH,
    EvaluateRecipe,
    check_systems,
    draw_settings,
    load_teller,
    open_gallery,
    path_or_none,
    report_once,
    report_settings,
    start_processes,
)
from ...evaluation.gallery import Gallery, draw_missing, true_gallery, write_stories
from ...evaluation.report import write_report
from ...llm.adapters import check_peft
from ..models.scorer import Scorer, accuracy, load_scorer
from ..world.render import render
from ..world.stories import TrueScene, held_out_state, stories, training_state
from .measure import features_of, measure, single_facts, summarise
from .systems import (
    caption_baseline,
    history,
    sentence,
    single_caption_systems,
    true_caption,
    two_stage,
    vokens,
)

SYSTEMS = ("vokens", "vokens_reference", "two_stage", "two_stage_history", "two_stage_caption", "oracle")
SHEET = 10  # single captions to a strip
MADE_BY = {  # the systems with weights of their own
    "vokens_reference": "python -m trainer mapper --set mapper=reference",
    "two_stage_caption": "python -m trainer caption-adapter",
}
PLOTTED = ("hero_unnamed", "prop_carried", "place", "time", "consistency", "image_similarity")

Stories = list[list[TrueScene]]


@dataclass(frozen=True)
class StorybookEvaluateRecipe(EvaluateRecipe):
    """The common part's settings, and the benchmark's own; keys that are about `data` count for nothing here.

    Settings are chosen on the `split` "validation": stories that no training draws, and `captions` by themselves,
    without held-out combinations. Without `feed_back` the LLM does not see the pictures of its story.
    """

    systems: tuple = SYSTEMS
    split: str = "test"
    captions: int = 200
    feed_back: bool = True
    reference_mapper: str = "storybook/benchmark/reference_mapper.safetensors"
    caption_adapter: str = "storybook/benchmark/caption_adapter"
    scorer: str = "storybook/benchmark/scorer.safetensors"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data:
            raise BadInputError(
                f"data is {self.data}, but this is the storybook's benchmark. Leave data out, or evaluate on it: "
                "python -m trainer evaluate --data PATH."
            )
        if self.picture_size:
            raise BadInputError(
                f"picture_size is {self.picture_size}, but data is not set: the storybook's pictures are measured by a "
                "scorer of their own size. Leave picture_size out, or set data."
            )
        if self.split not in ("test", "validation"):
            raise BadInputError(f"split is {self.split!r}; it can be test or validation.")
        self._check_count("captions")

    def _check_systems(self) -> None:
        removed = " vokens_consistent was removed: docs/findings.md says why."
        check_systems(self.systems, SYSTEMS, removed if "vokens_consistent" in self.systems else "")


@dataclass(frozen=True)
class Illustrated:
    """Stories, and where the pictures lie that each system has drawn for all of them."""

    stories: Stories
    galleries: dict[str, Gallery]

    def drawn(self) -> Iterator[tuple[str, list[list[DrawnScene]]]]:
        """Each system by name, with what it has drawn, story by story."""
        for name, gallery in self.galleries.items():
            yield name, gallery.load_all(len(self.stories))


def evaluate_storybook(recipe: StorybookEvaluateRecipe, out: Path) -> dict:
    """Draws, measures, writes `report.json`, the report's page and `pictures/` into `out`; returns the report.

    Processes, and pictures that are there already, are dealt with as in `trainer.evaluation.evaluate.evaluate`.
    """
    processes, pictures = start_processes(), out / "pictures"
    true_stories = list(islice(stories(recipe.seed, recipe.split), recipe.stories))
    teller = load_teller(recipe)
    systems = _systems(recipe, teller)
    single = single_caption_systems(teller, draw_settings(recipe))
    single = {name: system for name, system in single.items() if name in systems}
    whole = Illustrated(true_stories, _galleries(recipe, pictures, systems))
    alone = Illustrated(single_captions(recipe), _galleries(recipe, pictures / "captions", single))
    draw_missing(processes, whole.stories, recipe.seed, systems, whole.galleries)
    draw_missing(processes, alone.stories, recipe.seed, single, alone.galleries, stride=SHEET)
    return report_once(processes, out, lambda: _report(recipe, out, whole, alone))


def single_captions(recipe: StorybookEvaluateRecipe) -> Stories:
    """Captions by themselves, in sheets of SHEET; in the split "test" all of held-out combinations."""
    rng = random.Random(f"single captions/{recipe.seed}")
    any_state = held_out_state if recipe.split == "test" else training_state
    states = [any_state(rng) for _ in range(recipe.captions)]
    scenes = [TrueScene(state.caption(), "", state, names_kind=True, names_prop=True) for state in states]
    return [scenes[first : first + SHEET] for first in range(0, len(scenes), SHEET)]


def _systems(recipe: StorybookEvaluateRecipe, teller: StoryTeller) -> dict[str, System[TrueScene]]:
    """The systems that were asked for; one whose weights are missing is left out, and the way to them is said."""
    settings, feed_back = draw_settings(recipe), recipe.feed_back
    build = {
        "vokens": lambda: vokens(teller, settings, feed_back=feed_back),
        "vokens_reference": lambda: vokens(
            teller, settings, load_mapper(Path(recipe.reference_mapper))[0], feed_back
        ),
        "two_stage": lambda: two_stage(teller, settings, sentence),
        "two_stage_history": lambda: two_stage(teller, settings, history),
        "two_stage_caption": lambda: caption_baseline(teller, settings, _captioning_llm(recipe)),
        "oracle": lambda: two_stage(teller, settings, true_caption),
    }
    absent = _without_weights(recipe)
    return {name: build[name]() for name in recipe.systems if name not in absent}


def _own_weights(recipe: StorybookEvaluateRecipe) -> dict[str, Path]:
    """The weights of the systems that need more than the main parts."""
    return {
        "vokens_reference": Path(recipe.reference_mapper),
        "two_stage_caption": Path(recipe.caption_adapter),
    }


def _without_weights(recipe: StorybookEvaluateRecipe) -> set[str]:
    """The systems that were asked for and whose own weights are missing, each named with what makes them."""
    own = _own_weights(recipe)
    absent = {name for name, path in own.items() if name in recipe.systems and not path.exists()}
    for name in sorted(absent):
        print(f"system {name} is left out: there is nothing at {own[name]}. It is made by {MADE_BY[name]}")
    return absent


def _captioning_llm(recipe: StorybookEvaluateRecipe) -> FrozenLLM:
    """The LLM with the caption baseline's adapter, which PEFT reads: it holds no voken rows."""
    llm = load_llm(path_or_none(recipe.llm) or default_llm())
    check_peft(Path(recipe.caption_adapter))
    adapted = PeftModel.from_pretrained(llm.causal_lm, recipe.caption_adapter)
    return replace(llm, causal_lm=adapted.merge_and_unload().eval())


def _galleries(recipe: StorybookEvaluateRecipe, folder: Path, names: Iterable[str]) -> dict[str, Gallery]:
    """Where each system's pictures lie below `folder`; what they were drawn with are all parts, and its own."""
    own = _own_weights(recipe)
    drawn_with = (*DRAWN_WITH, "split", "feed_back")
    return {
        name: open_gallery(recipe, folder / name, drawn_with, [own[name]] if name in own else [])
        for name in names
    }


def _report(recipe: StorybookEvaluateRecipe, out: Path, whole: Illustrated, alone: Illustrated) -> None:
    """Measures what was drawn, of whole stories and of captions alone, and writes the report."""
    scorer = load_scorer(Path(recipe.scorer))
    true_features = _true_features(recipe, out, whole.stories, scorer)
    measured = {name: measure(scorer, whole.stories, drawn, true_features) for name, drawn in whole.drawn()}
    single = {name: single_facts(scorer, alone.stories, drawn) for name, drawn in alone.drawn()}
    report = summarise(whole.stories, measured, true_features, single)
    report["settings"] = report_settings(recipe) | {
        "scenes": sum(map(len, whole.stories)),
        "scorer_accuracy": accuracy(scorer, 500, seed=recipe.seed + 1),
    }
    texts = [[scene.text for scene in story] for story in whole.stories]
    for name, gallery in whole.galleries.items():
        write_stories(out, name, texts, gallery)
    captions = [scene.caption for scene in alone.stories[0]]
    write_report(out, report, _introduction(report["settings"]), texts, captions, PLOTTED)


def _true_features(
    recipe: StorybookEvaluateRecipe, out: Path, true_stories: Stories, scorer: Scorer
) -> np.ndarray:
    """(N, D) of what each scene's picture should show, which is kept beside the systems' pictures."""
    true = [_true_pictures(recipe.seed, number, story) for number, story in enumerate(true_stories)]
    for number, pictures in enumerate(true):
        true_gallery(out).save(number, [DrawnScene(picture) for picture in pictures])
    return features_of(scorer, [picture for pictures in true for picture in pictures])


def _true_pictures(seed: int, number: int, story: Sequence[TrueScene]) -> list[Image.Image]:
    return [
        render(scene.state, random.Random(f"true/{seed}/{number}/{index}"))
        for index, scene in enumerate(story)
    ]


def _introduction(settings: dict) -> str:
    """What was measured, in a few sentences."""
    right = ", ".join(f"{100 * value:.1f} % ({fact})" for fact, value in settings["scorer_accuracy"].items())
    return (
        f"{settings['stories']} {settings['split']} stories, seed {settings['seed']}, {settings['scenes']} scenes in "
        f"all, {settings['steps']} steps, guidance {settings['guidance']:g}. Their sentences are given to every row. "
        f"The scorer is right on {right} of fresh renders."
    )
