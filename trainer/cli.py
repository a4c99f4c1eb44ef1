"""python -m trainer COMMAND --recipe FILE.toml --out FOLDER [--set key=value ...]

    storybook            show or write the storybook's stories and pictures
    storybook-diffusion  train the storybook's autoencoder, text encoder and UNet
    storybook-scorer     train the classifier that measures pictures
    align                stage 1: captions to pictures; from captions alone too (--set format=captions)
    finetune             stage 2: interleaved stories
    mapper               the mapper alone, for another diffusion model or another shape
    image-adapter        teach the frozen LLM to see pictures
    caption-adapter      the benchmark's caption baseline: the LLM writes captions
    data check PATH      read a data set of yours, pictures or captions alone, and say what is in it and what is broken
    data cache PATH      compute once what training needs of its pictures and captions
    data export PATH     write the storybook's stories in any of the formats, with pictures or with captions only
    evaluate             vokens beside the two-stage pipeline, on the storybook or a data set, with a report
    convert              published checkpoints into our files (convert --help)
    ab                   people's verdict: pairs of stories, shown blind in a local web page (ab --help)
    world FILE           stories with captions and no pictures, of a world that a TOML file describes
    write                stories with captions and no pictures, written by an instruct LLM of yours
    ablate               short trainings with one thing changed, each measured
    storybook-score      illustrate held-out stories and score the pictures
    storybook-bundle     lay trained parts into the folder the main job loads

Exit codes: 0 done, or ended by SIGTERM with the work saved; 1 a check failed, or a run could not go on; 2 bad input;
130 interrupted (with the work saved).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt5_core.errors import BadInputError

from .ab.cli import run as run_ab
from .common.progress import Terminated, TrainingError
from .convert.cli import run as run_convert

if TYPE_CHECKING:
    from .data.source import OpenSource
    from .evaluation.evaluate import EvaluateRecipe
    from .training.config import StageRecipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, required=True, help="where the results go")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value"
        )
        command.add_argument("--recipe", type=Path, help="a TOML file, see trainer/recipes/")
        if name == "evaluate":
            command.add_argument("--stories", type=int, help="how many held-out stories")
            command.add_argument("--seed", type=int, help="another seed takes other stories")
            command.add_argument("--data", help="a data set in place of the storybook's world")
            command.add_argument("--format", help=f"of --data: {', '.join(LAYOUTS)}")
            command.add_argument("--systems", help="whom to compare, such as vokens,two_stage,oracle")
        if name in ("align", "finetune", "mapper"):
            command.add_argument("--resume", action="store_true", help="go on from the state saved in --out")
        if name in ("align", "finetune", "mapper", "storybook-diffusion", "image-adapter"):
            command.add_argument(
                "--from", dest="start", type=Path, help="an earlier run's --out folder to go on from"
            )
    _add_data(commands)
    _add_worlds(commands)
    return parser


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="data sets: check one, cache one, write the storybook as one")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read all of it, and say what is in it and what is broken")
    check.add_argument("--out", type=Path, help="where a contact sheet and check.json go")
    export = actions.add_parser("export", help="write the storybook's stories in a format")
    export.add_argument("--stories", type=int, default=8)
    export.add_argument("--seed", type=int, default=0)
    export.add_argument(
        "--captions-only", action="store_true", help="describe the pictures, and draw none (jsonl, captions)"
    )
    cache = actions.add_parser("cache", help="compute once what training needs of its pictures and captions")
    cache.add_argument("--out", type=Path, required=True, help="the cache's folder; what it has stays")
    cache.add_argument(
        "--diffusion",
        type=Path,
        default=Path("storybook/diffusers"),
        help="whose latents and text encoder: a folder, or for captions alone a checkpoint file",
    )
    cache.add_argument(
        "--diffusion-precision", default="float32", choices=("float32", "bf16"), help="as the recipe's"
    )
    cache.add_argument("--picture-size", type=int, default=0, help="as the recipe's: pixels, 0 is its own")
    cache.add_argument("--tokenizer", default="", help="as the recipe's: of a --diffusion checkpoint file")
    cache.add_argument("--image-adapter", type=Path, help="caches image tokens too, as it makes them")
    cache.add_argument("--llm", type=Path, help="the image adapter's LLM; without one it is not loaded")
    existing = "the annotation file, or the folder"
    for action, what in ((check, existing), (cache, existing), (export, "a new folder")):
        action.add_argument("path", type=Path, help=what)
        action.add_argument(
            "--format", required=True, dest="layout", metavar="FORMAT", help=", ".join(LAYOUTS)
        )


def _add_worlds(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    told = "stories with captions and no pictures"
    world = commands.add_parser("world", help=f"{told}, of a world that a TOML file describes")
    world.add_argument("file", type=Path, help="such as trainer/worlds/knights.toml, which explains itself")
    world.add_argument(
        "--out", type=Path, help="a new .jsonl file; without one the world is checked and shown"
    )
    world.add_argument("--stories", type=int, help="how many: 1500, or 40 with --measure")
    world.add_argument("--seed", type=int, help="another seed tells other stories")
    world.add_argument(
        "--split",
        default="train",
        choices=("train", "validation", "test"),
        help="test: held-out combinations",
    )
    world.add_argument(
        "--measure", type=Path, metavar="RUN", help="are captions of held-out stories what this run asks for?"
    )
    world.add_argument("--diffusion", default="storybook/diffusers", help="of --measure: whose text encoder")
    world.add_argument("--llm", default="", help="of --measure: a folder; without one the default LLM")
    write = commands.add_parser("write", help=f"{told}, written by an instruct LLM of yours")
    write.add_argument("--llm", type=Path, help="a Hugging Face folder or .gguf file; else the default LLM")
    write.add_argument(
        "--precision", default="float32", choices=("float32", "bf16", "4bit"), help="of the LLM"
    )
    write.add_argument("--device", default="cpu", help="such as cuda")
    write.add_argument("--out", type=Path, required=True, help="a .jsonl file; what it holds is kept")
    for name, default in (("stories", 500), ("scenes", 4), ("seed", 0), ("temperature", 0.7)):
        write.add_argument(f"--{name}", type=type(default), default=default)


def _world(arguments: argparse.Namespace) -> int:
    from .worlds.checks import load_world
    from .worlds.export import summary, write_stories

    world, given = load_world(arguments.file), {"stories": arguments.stories, "seed": arguments.seed}
    if arguments.measure:
        from .evaluation.nearest import NearestRecipe, measure_world

        known = {name: value for name, value in given.items() if value is not None}
        models = {"llm": arguments.llm, "diffusion": arguments.diffusion}
        measure_world(world, NearestRecipe(arguments.measure, **models, **known))
    elif arguments.out:
        count = 1500 if arguments.stories is None else arguments.stories
        write_stories(world, count, arguments.out, arguments.seed or 0, arguments.split)
        print(f"{count} stories: {arguments.out}")
    else:
        for line in summary(world, arguments.seed or 0, arguments.split):
            print(line)
    return 0


def _write(arguments: argparse.Namespace) -> int:
    from minigpt5_core.llm import load_llm
    from minigpt5_core.llm.files import default_llm
    from minigpt5_core.llm.precision import dtype_and_quantization

    from .worlds.write import WriteSettings, write_with_llm

    names = ("stories", "scenes", "seed", "temperature")
    settings = WriteSettings(**{name: getattr(arguments, name) for name in names})
    how = dtype_and_quantization(arguments.precision)
    llm = load_llm(arguments.llm or default_llm(), device=arguments.device, **how)
    print(f"{arguments.out}: {write_with_llm(llm, settings, arguments.out)}")
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from .data.check import check

    return 0 if check(arguments.path, arguments.layout, arguments.out).rows else 1


def _data_cache(arguments: argparse.Namespace) -> int:
    from .feature_cache.build import cache_features

    parts = arguments.diffusion, arguments.llm, arguments.image_adapter
    how = arguments.diffusion_precision, arguments.picture_size, arguments.tokenizer
    built = cache_features(arguments.path, arguments.layout, arguments.out, *parts, *how)
    return 0 if built.pictures or built.captions else 1


def _data_export(arguments: argparse.Namespace) -> int:
    from .storybook.world.export import export_stories

    path = export_stories(
        arguments.layout,
        arguments.stories,
        arguments.seed,
        arguments.path,
        captions_only=arguments.captions_only,
    )
    print(f"{arguments.stories} stories: {path}")
    return 0


def open_source(recipe: "StageRecipe") -> "OpenSource":
    """What the recipe trains on: its data set, or the storybook's world where it names none."""
    if recipe.data.path:
        from .training.setup import open_records

        return open_records(recipe)
    from .storybook.world.source import open_storybook

    return open_storybook(recipe)


def _align(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .stages.align import AlignRecipe, train_align

    recipe = load_recipe(AlignRecipe, arguments.recipe, arguments.set)
    train_align(recipe, arguments.out, open_source(recipe), arguments.start, arguments.resume)
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .stages.finetune import FinetuneRecipe, train_finetune

    recipe = load_recipe(FinetuneRecipe, arguments.recipe, arguments.set)
    train_finetune(recipe, arguments.out, open_source(recipe), arguments.start, arguments.resume)
    return 0


def _mapper(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .stages.mapper import MapperRecipe, train_mapper

    recipe = load_recipe(MapperRecipe, arguments.recipe, arguments.set)
    train_mapper(recipe, arguments.out, open_source(recipe), arguments.start, arguments.resume)
    return 0


def _storybook(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.world.sample import SampleRecipe, write_sample

    write_sample(load_recipe(SampleRecipe, arguments.recipe, arguments.set), arguments.out)
    return 0


def _diffusion(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.models.diffusion import StorybookDiffusionRecipe, train_storybook_diffusion

    recipe = load_recipe(StorybookDiffusionRecipe, arguments.recipe, arguments.set)
    train_storybook_diffusion(recipe, arguments.out, arguments.start)
    return 0


def _scorer(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.models.scorer import ScorerRecipe, train_scorer

    scores = train_scorer(load_recipe(ScorerRecipe, arguments.recipe, arguments.set), arguments.out)
    return 0 if min(scores.values()) >= 0.99 else 1


def _score(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.benchmark.score import ScoreRecipe, score_storybook

    return (
        0 if score_storybook(load_recipe(ScoreRecipe, arguments.recipe, arguments.set), arguments.out) else 1
    )


def _image_adapter(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.models.image_adapter import ImageAdapterRecipe, train_image_adapter

    recipe = load_recipe(ImageAdapterRecipe, arguments.recipe, arguments.set)
    train_image_adapter(recipe, arguments.out, arguments.start)
    return 0


def _caption_adapter(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.models.caption_baseline import CaptionAdapterRecipe, train_caption_adapter

    train_caption_adapter(load_recipe(CaptionAdapterRecipe, arguments.recipe, arguments.set), arguments.out)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    evaluate, recipe = _evaluation(arguments)
    evaluate(recipe, arguments.out)
    return 0


def _evaluation(arguments: argparse.Namespace) -> "tuple[Callable[[Any, Path], dict], EvaluateRecipe]":
    """The program that `arguments` ask for, with its recipe: on a data set where one is named, else the benchmark."""
    from .common.recipe import build_recipe, read_values
    from .evaluation.evaluate import EvaluateRecipe, evaluate

    given = {name: getattr(arguments, name) for name in ("stories", "seed", "data", "format")}
    if arguments.systems is not None:
        given["systems"] = json.dumps(arguments.systems.split(","))
    changes = [f"{name}={value}" for name, value in given.items() if value is not None]
    values = read_values(EvaluateRecipe, arguments.recipe, arguments.set + changes)
    source = str(arguments.recipe or "--set")
    if values.get("data"):
        return evaluate, build_recipe(EvaluateRecipe, _without_storybook(values), source)
    from .storybook.benchmark.evaluate import StorybookEvaluateRecipe, evaluate_storybook

    return evaluate_storybook, build_recipe(StorybookEvaluateRecipe, values, source)


def _without_storybook(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without the keys and systems that the storybook's benchmark alone has; what is left out is said."""
    from .evaluation.evaluate import EvaluateRecipe
    from .evaluation.systems import SYSTEMS

    general, names = {field.name for field in fields(EvaluateRecipe)}, values.get("systems", SYSTEMS)
    if not isinstance(names, list | tuple) or (values.keys() <= general and set(names) <= set(SYSTEMS)):
        return values
    from .storybook.benchmark import evaluate as benchmark

    keys = {field.name for field in fields(benchmark.StorybookEvaluateRecipe)} - general
    systems = [name for name in names if name in benchmark.SYSTEMS and name not in SYSTEMS]
    kept = [name for name in names if name not in systems]
    if not kept:
        raise BadInputError(
            f"systems: {', '.join(systems)} need the storybook's world. On data: {', '.join(SYSTEMS)}."
        )
    if left_out := [*sorted(keys & values.keys()), *systems]:
        print(f"left out, being about the storybook's world alone: {', '.join(left_out)}")
    return {key: value for key, value in values.items() if key not in keys} | {"systems": kept}


def _ablate(arguments: argparse.Namespace) -> int:
    from .storybook.benchmark.ablate import run_ablations

    if arguments.recipe is None or arguments.set:
        raise BadInputError(
            "ablate takes everything from --recipe: see trainer/recipes/storybook_ablations.toml."
        )
    run_ablations(arguments.recipe, arguments.out)
    return 0


def _bundle(arguments: argparse.Namespace) -> int:
    from .common.recipe import load_recipe
    from .storybook.models.bundle import BundleRecipe, write_bundle

    write_bundle(load_recipe(BundleRecipe, arguments.recipe, arguments.set), arguments.out)
    return 0


COMMANDS = {
    "storybook": (_storybook, "write stories with their pictures, to look at or to train on"),
    "storybook-diffusion": (_diffusion, "train the storybook's text-to-image model from nothing"),
    "storybook-scorer": (_scorer, "train the classifier that measures pictures"),
    "align": (_align, "stage 1: captions to pictures; trains voken rows and mapper"),
    "finetune": (_finetune, "stage 2: interleaved stories; trains LoRA, voken rows and mapper"),
    "mapper": (_mapper, "trains the mapper alone, on what an LLM with its adapter says"),
    "image-adapter": (
        _image_adapter,
        "teach the frozen LLM to see: trains an image encoder and its projector",
    ),
    "caption-adapter": (
        _caption_adapter,
        "the benchmark's caption baseline: an LLM tuned to write captions for its pictures",
    ),
    "evaluate": (
        _evaluate,
        "vokens beside the two-stage pipeline, on the storybook or a data set, with intervals and a report",
    ),
    "ablate": (_ablate, "short trainings with one thing changed at a time, each measured by the benchmark"),
    "storybook-score": (_score, "illustrate held-out stories, their sentences given, and score the pictures"),
    "storybook-bundle": (_bundle, "lay trained parts into the folder the main job loads, in half precision"),
}

LAYOUTS = ("folder", "jsonl", "cc3m", "webdataset", "vist", "mmdialog", "captions")
DATA = {"check": _data_check, "cache": _data_cache, "export": _data_export}
WORLDS = {"world": _world, "write": _write}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["ab"]:
        return run_ab(given[1:])
    if given[:1] == ["convert"]:
        return run_convert(given[1:])
    arguments = _parser().parse_args(given)
    try:
        if arguments.command == "data":
            return DATA[arguments.action](arguments)
        if arguments.command in WORLDS:
            return WORLDS[arguments.command](arguments)
        return COMMANDS[arguments.command][0](arguments)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Terminated:
        return 0  # it was asked to end, and has saved its work
    except KeyboardInterrupt:
        return 130
