"""Ablations: the same short training with one thing changed at a time, each measured by the benchmark.

    python -m trainer ablate --recipe trainer/recipes/storybook_ablations.toml --out runs/ablations

What was trained or measured by the same recipe is not trained or measured again. Beside the benchmark's columns stands
`text_loss`: what the held-out stories' own words cost the LLM, in nats a token, which pictures do not show.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt5_core.errors import BadInputError
from minigpt5_core.metrics import bootstrap
from minigpt5_core.story.prompts import Turn
from minigpt5_core.texts import text_in

from ...common.recipe import build_recipe, in_place, merged
from ...evaluation.table import cell
from ...llm.sequences import story_losses, story_sequence
from ...stages.align import AlignRecipe, train_align
from ...stages.finetune import FinetuneRecipe, train_finetune
from ..world.source import open_storybook
from ..world.stories import stories
from .evaluate import StorybookEvaluateRecipe, evaluate_storybook, load_teller

STAGES = {"align": AlignRecipe, "finetune": FinetuneRecipe, "evaluate": StorybookEvaluateRecipe}
SHOWN = ("hero_unnamed", "prop_carried", "place", "time", "image_similarity", "text_loss")

Evaluate = Callable[[StorybookEvaluateRecipe, Path], dict]


@dataclass(frozen=True)
class Variant:
    """One thing changed. A stage that is None is left out."""

    align: AlignRecipe | None
    finetune: FinetuneRecipe | None
    evaluate: StorybookEvaluateRecipe

    def __post_init__(self) -> None:
        if self.align is None and self.finetune is None:
            raise BadInputError("A variant needs at least one stage: give align or finetune 1 step or more.")


def read_variants(path: Path) -> dict[str, Variant]:
    """The recipe's `[align]`, `[finetune]` and `[evaluate]` with each `[variants.NAME]` laid over them.

    All are built before anything is trained; BadInputError names the file and what in it is wrong.
    """
    try:
        values = tomllib.loads(text_in(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputError(f"Recipe {path} cannot be read: {error}.") from error
    changes = values.pop("variants", {})
    unknown = set(values) - set(STAGES) | {
        name for change in changes.values() for name in set(change) - set(STAGES)
    }
    if unknown or not changes:
        raise BadInputError(
            f"Recipe {path}: found {', '.join(sorted(unknown)) or 'no variants'}; expected tables align, finetune and "
            "evaluate, and the same below each variants.NAME."
        )
    return {name: _variant(values, change, f"{path}: {name}") for name, change in changes.items()}


def _variant(values: dict[str, dict], change: dict[str, dict], source: str) -> Variant:
    laid = {
        stage: merged(
            in_place(kind, values.get(stage, {}), source), in_place(kind, change.get(stage, {}), source)
        )
        for stage, kind in STAGES.items()
    }
    trained = {stage: laid[stage].get("optim", {}).get("steps", 1) for stage in ("align", "finetune")}
    return Variant(
        build_recipe(AlignRecipe, laid["align"], source) if trained["align"] else None,
        build_recipe(FinetuneRecipe, laid["finetune"], source) if trained["finetune"] else None,
        build_recipe(StorybookEvaluateRecipe, {"systems": ["vokens"]} | laid["evaluate"], source),
    )


def run_ablations(recipe: Path, out: Path, evaluate: Evaluate = evaluate_storybook) -> dict[str, dict]:
    """Trains and measures every variant; writes `ablations.json` and `ablations.md`, a row each.

    BadInputError for a recipe that names no variant, or what is none, before anything is trained.
    """
    variants = read_variants(recipe)
    table: dict[str, dict] = {}
    for name, variant in variants.items():
        print(f"variant {name}", flush=True)
        table[name] = _run(variant, name, out, evaluate)
        (out / "ablations.json").write_text(json.dumps(table, indent=1) + "\n")
        (out / "ablations.md").write_text(as_markdown(table))
    return table


def _run(variant: Variant, name: str, out: Path, evaluate: Evaluate) -> dict[str, Any]:
    """The variant's row, measured now or, by the same recipe, before."""
    kept, recipe = out / name / "variant.json", json.loads(json.dumps(asdict(variant)))
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    if before.get("recipe") == recipe:
        return before["row"]
    trained = _train(variant, out / "trained")
    adapter, mapper = str(trained / "adapter"), str(trained / "mapper.safetensors")
    measured = replace(variant.evaluate, adapter=adapter, mapper=mapper)
    row = evaluate(measured, out / name)["rows"]["vokens"] | {"text_loss": text_loss(measured)}
    draft = kept.with_suffix(".new")
    draft.write_text(json.dumps({"recipe": recipe, "row": row}, indent=1) + "\n")
    draft.replace(kept)  # never half of it, which could not be read again
    return row


@torch.no_grad()
def text_loss(recipe: StorybookEvaluateRecipe) -> dict[str, float] | None:
    """The mean over the held-out stories of their text loss (nats a token; words, [IMG0] and end marks), no picture
    shown, with its interval."""
    llm = load_teller(recipe).llm
    losses = []
    for story in islice(stories(recipe.seed, recipe.split), recipe.stories):
        sequence = story_sequence(llm, [Turn(scene.request, scene.text) for scene in story])
        losses.append(story_losses(llm, [sequence])[1].item())
    return cell(bootstrap(np.array(losses), np.arange(len(losses))))


def _train(variant: Variant, out: Path) -> Path:
    """Both stages, or the one there is; returns the folder of what was trained last.

    A stage that another variant has trained by the same recipe, from the same start, is taken from there.
    """
    start: Path | None = None
    for stage in (variant.align, variant.finetune):
        if stage is None:
            continue
        digest = hashlib.sha256(f"{stage} from {start and start.name}".encode()).hexdigest()[:12]
        folder = out / digest
        if not (folder / "mapper.safetensors").is_file():  # written last
            if isinstance(stage, AlignRecipe):
                train_align(stage, folder, open_storybook(stage), start)
            else:
                train_finetune(stage, folder, open_storybook(stage), start)
        start = folder
    assert start is not None
    return start


def as_markdown(table: dict[str, dict]) -> str:
    """The columns that tell most, with their intervals."""
    lines = [f"| variant | {' | '.join(SHOWN)} |", f"| --- |{' --- |' * len(SHOWN)}"]
    for name, cells in table.items():
        shown = [
            f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" if (c := cells[key]) else "–"
            for key in SHOWN
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
