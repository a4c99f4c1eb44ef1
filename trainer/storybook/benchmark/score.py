"""Illustrates held-out stories, their sentences given, and scores the pictures against the truth."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from minigpt5_core.pipeline import Parts, StoryTeller, load
from minigpt5_core.story.prompts import Turn

from ...common.images import grid
from ...llm.sequences import story_losses, story_sequence
from ..models.scorer import load_scorer
from ..world.state import State
from ..world.stories import TrueScene, stories

BAR = {"hero_unnamed": 0.60, "place": 0.85, "time": 0.85}


@dataclass(frozen=True)
class ScoreRecipe:
    """Which stories, drawn how, by which parts. `oracle` adds a row drawn from the true full captions."""

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


def score_storybook(recipe: ScoreRecipe, out: Path) -> bool:
    """Writes `scores.json` and a contact sheet for each row into `out`; whether the vokens pass the bar."""
    out.mkdir(parents=True, exist_ok=True)
    teller = load(
        Parts(_path(recipe.llm), _path(recipe.adapter), _path(recipe.mapper), _path(recipe.diffusion))
    )
    scorer = load_scorer(Path(recipe.scorer))
    told = list(islice(stories(recipe.seed, "test"), recipe.stories))
    rows = {"vokens": draw_vokens(teller, told, recipe)}
    if recipe.oracle:
        rows["oracle"] = draw_captions(teller, told, recipe)
    scenes = [scene for story in told for scene in story]
    scores = {}
    for name, pictures in rows.items():
        scores[name] = shares(scenes, scorer.read(pictures))
        grid(pictures[:48], 8).save(out / f"{name}.png")
        print(name, "  ".join(f"{key} {value:.3f}" for key, value in scores[name].items()))
    (out / "scores.json").write_text(json.dumps({"scenes": len(scenes), **scores}, indent=1) + "\n")
    return all(scores["vokens"][name] >= least for name, least in BAR.items())


def _path(value: str) -> Path | None:
    return Path(value) if value else None


@torch.no_grad()
def draw_vokens(teller: StoryTeller, told: list[list[TrueScene]], recipe: ScoreRecipe) -> list[Image.Image]:
    """One picture a scene: the story up to its sentence -> vokens -> mapper -> diffusion model."""
    pictures = []
    for index, story in enumerate(told):
        states, _ = story_losses(
            teller.llm, [story_sequence(teller.llm, [Turn(scene.request, scene.text) for scene in story])]
        )
        positive, negative = (
            teller.mapper(states).tokens,
            teller.mapper.negative().tokens.expand(len(states), -1, -1),
        )
        pictures += _pictures(teller, recipe, index, prompt_embeds=positive, negative_prompt_embeds=negative)
    return pictures


def draw_captions(teller: StoryTeller, told: list[list[TrueScene]], recipe: ScoreRecipe) -> list[Image.Image]:
    """One picture a scene from its true full caption: the ceiling."""
    pictures = []
    for index, story in enumerate(told):
        prompts = [scene.caption for scene in story]
        pictures += _pictures(teller, recipe, index, prompt=prompts, negative_prompt=[""] * len(prompts))
    return pictures


def _pictures(teller: StoryTeller, recipe: ScoreRecipe, story: int, **prompt: object) -> list[Image.Image]:
    return teller.diffusion(
        **prompt,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance,
        generator=torch.Generator().manual_seed(recipe.seed * 10_000 + story),
    ).images


def shares(truth: list[TrueScene], seen: list[State]) -> dict[str, float]:
    """The share of scenes right, by hero, prop, place and time; heroes also where the sentence names no kind."""

    def share(name: str, rows: list[int]) -> float:
        right = sum(getattr(truth[row].state, name) == getattr(seen[row], name) for row in rows)
        return round(right / len(rows), 4)

    every = list(range(len(truth)))
    unnamed = [row for row in every if not truth[row].names_kind]
    named = [row for row in every if truth[row].names_kind]
    return {
        "hero": share("hero", every),
        "hero_named": share("hero", named),
        "hero_unnamed": share("hero", unnamed),
        "prop": share("prop", every),
        "place": share("place", every),
        "time": share("time", every),
    }
