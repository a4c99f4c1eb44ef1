"""Ablations: the same short training with one thing changed at a time, each measured by the benchmark.

    python -m trainer ablate --recipe trainer/recipes/storybook_ablations.toml --out runs/ablations

A variant that is done is not trained again: an interrupted run goes on where it was.
"""

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt5_core.errors import BadInputError

from .align import AlignRecipe, train_align
from .evaluate import EvaluateRecipe, evaluate
from .finetune import FinetuneRecipe, train_finetune
from .recipe import build_recipe

SHOWN = ("hero_unnamed", "prop_carried", "place", "time", "image_similarity")


@dataclass(frozen=True)
class Variant:
    """One thing changed: settings laid over each stage's; a stage of 0 steps is left out."""

    align: dict
    finetune: dict
    evaluate: dict


def read_variants(path: Path) -> dict[str, Variant]:
    """The recipe's `[align]`, `[finetune]` and `[evaluate]` with each `[variants.NAME]` laid over them."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputError(f"Recipe {path} cannot be read: {error}.") from error
    stages = ("align", "finetune", "evaluate")
    changes = values.pop("variants", {})
    unknown = set(values) - set(stages) | {
        name for change in changes.values() for name in set(change) - set(stages)
    }
    if unknown or not changes:
        raise BadInputError(
            f"Recipe {path}: found {', '.join(sorted(unknown)) or 'no variants'}; expected tables align, finetune and "
            "evaluate, and the same below each variants.NAME."
        )
    return {
        name: Variant(*(values.get(stage, {}) | change.get(stage, {}) for stage in stages))
        for name, change in changes.items()
    }


def run_ablations(recipe: Path, out: Path) -> dict[str, dict]:
    """Trains and measures every variant; writes `ablations.json` and `ablations.md`, a row each."""
    variants = read_variants(recipe)
    table: dict[str, dict] = {}
    for name, variant in variants.items():
        print(f"variant {name}", flush=True)
        table[name] = _run(variant, out / name)
        (out / "ablations.json").write_text(json.dumps(table, indent=1) + "\n")
        (out / "ablations.md").write_text(as_markdown(table))
    return table


def _run(variant: Variant, out: Path) -> dict[str, Any]:
    report = out / "report.json"
    if not report.is_file():
        trained = _train(variant, out)
        recipe = build_recipe(EvaluateRecipe, {"rows": ["vokens"]} | variant.evaluate, "evaluate")
        adapter, mapper = str(trained / "adapter"), str(trained / "mapper.safetensors")
        evaluate(replace(recipe, adapter=adapter, mapper=mapper), out)
    return json.loads(report.read_text())["rows"]["vokens"]


def _train(variant: Variant, out: Path) -> Path:
    """Both stages, or the one that has steps; returns the folder of what was trained last."""
    start: Path | None = None
    if variant.align.get("steps", 1):
        train_align(build_recipe(AlignRecipe, variant.align, "align"), out / "align")
        start = out / "align"
    if variant.finetune.get("steps", 1):
        train_finetune(build_recipe(FinetuneRecipe, variant.finetune, "finetune"), out / "finetune", start)
        start = out / "finetune"
    if start is None:
        raise BadInputError("A variant needs at least one stage: give align or finetune 1 step or more.")
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
