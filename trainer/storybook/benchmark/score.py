"""Illustrates held-out stories, their sentences given, and scores the pictures against the truth.

    python -m trainer storybook-score --out runs/score

A quick look with a bar to pass, by the benchmark's own systems and measures: no intervals, and the LLM does not see the
pictures of its story.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_core.pipeline import StoryTeller

from ...common.images import grid
from ...evaluation.drawing import DrawSettings, System
from ...evaluation.evaluate import load_teller
from ...evaluation.gallery import STRIDE
from ..models.scorer import load_scorer
from ..world.state import State
from ..world.stories import TrueScene, stories
from .evaluate import StorybookEvaluateRecipe
from .measure import scene_facts
from .systems import true_caption, two_stage, vokens

BAR = {"hero_unnamed": 0.60, "place": 0.85, "time": 0.85}
SHARES = ("hero", "hero_named", "hero_unnamed", "prop", "place", "time")
SHEET = 48  # pictures on a contact sheet


@dataclass(frozen=True)
class ScoreRecipe:
    """Which stories, drawn how, by which parts. `oracle` adds a system that draws the true full captions."""

    stories: int = 40
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    llm: str = ""
    adapter: str = ""
    mapper: str = ""
    diffusion: str = ""
    scorer: str = "storybook/benchmark/scorer.safetensors"
    oracle: bool = True

    @property
    def parts(self) -> StorybookEvaluateRecipe:
        """The same parts, as the benchmark loads them."""
        return StorybookEvaluateRecipe(
            llm=self.llm, adapter=self.adapter, mapper=self.mapper, diffusion=self.diffusion
        )


def score_storybook(recipe: ScoreRecipe, out: Path) -> bool:
    """Writes `scores.json` and a contact sheet for each system into `out`; whether the vokens pass the bar."""
    out.mkdir(parents=True, exist_ok=True)
    teller, scorer = load_teller(recipe.parts), load_scorer(Path(recipe.scorer))
    true_stories = list(islice(stories(recipe.seed, "test"), recipe.stories))
    scenes = [scene for story in true_stories for scene in story]
    scores = {}
    for name, system in _systems(recipe, teller).items():
        pictures = _pictures(system, true_stories, recipe.seed)
        scores[name] = shares(scenes, scorer.read(pictures))
        grid(pictures[:SHEET], 8).save(out / f"{name}.png")
        print(name, "  ".join(f"{key} {value:.3f}" for key, value in scores[name].items()))
    (out / "scores.json").write_text(json.dumps({"scenes": len(scenes), **scores}, indent=1) + "\n")
    return all(scores["vokens"][name] >= least for name, least in BAR.items())


def _systems(recipe: ScoreRecipe, teller: StoryTeller) -> dict[str, System[TrueScene]]:
    settings = DrawSettings(recipe.steps, recipe.guidance)
    systems = {"vokens": vokens(teller, settings, feed_back=False)}
    return systems | ({"oracle": two_stage(teller, settings, true_caption)} if recipe.oracle else {})


def _pictures(system: System[TrueScene], true_stories: list[list[TrueScene]], seed: int) -> list[Image.Image]:
    """One picture a scene, drawn from the seeds that the benchmark takes."""
    return [
        scene.picture
        for number, story in enumerate(true_stories)
        for scene in system(story, STRIDE * (seed + number))
    ]


def shares(truth: list[TrueScene], seen: list[State]) -> dict[str, float]:
    """The share of scenes right, by hero, prop, place and time; heroes also where the sentence names a kind or none.

    NaN where no scene is of that kind.
    """
    facts = scene_facts(truth, seen)
    return {name: _share(facts[name]) for name in SHARES}


def _share(right: np.ndarray) -> float:
    """The mean of what is defined."""
    defined = right[~np.isnan(right)]
    return round(float(defined.mean()), 4) if len(defined) else float("nan")
