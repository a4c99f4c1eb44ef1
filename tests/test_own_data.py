"""Your own data through every stage and the evaluation, with the storybook nowhere to be found."""

import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from trainer.common.recipe import make_recipe
from trainer.data.record_source import RecordSource
from trainer.evaluation.evaluate import EvaluateRecipe, evaluate
from trainer.stages.align import AlignRecipe, train_align
from trainer.stages.finetune import FinetuneRecipe, train_finetune
from trainer.stages.mapper import MapperRecipe, train_mapper
from trainer.training.setup import open_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.trains]
SAMPLES = Path(__file__).parent / "samples"
VIST = SAMPLES / "VIST" / "val_cleaned.json"
TEXTS = [row["caption"] for row in json.loads(VIST.read_text())["40001"]]


class NoStorybook:
    """An import system in which the storybook does not exist."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith("trainer.storybook"):
            raise ModuleNotFoundError(f"{name} was imported")
        return None


@pytest.fixture
def without_storybook(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands behind `trained`, whose image adapter the storybook has made."""
    for name in [name for name in sys.modules if name.startswith("trainer.storybook")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoStorybook(), *sys.meta_path])


@pytest.fixture
def sampled() -> list[dict]:
    """What a stage's source gave it, step by step."""
    return []


@pytest.fixture
def watching(sampled: list[dict]) -> Any:
    """Opens a recipe's data set, and keeps what it samples."""

    def watch(recipe: Any) -> Any:
        def open_source(llm: Any, features: Any) -> RecordSource:
            source: Any = open_records(recipe)(llm, features)
            plain = source.sample

            def sample(*given: Any) -> dict:
                sampled.append(plain(*given))
                return sampled[-1]

            source.sample = sample
            return source

        return open_source

    return watch


def assert_of_the_sample(sampled: list[dict]) -> None:
    """All examples are of the one story: no text of another world, and no question that nobody asked."""
    assert sampled and all(set(step) == {"text"} for step in sampled)
    examples = [example for step in sampled for example in step["text"]]
    assert {target.caption for example in examples for target in example.targets} <= set(TEXTS)
    said = {turn.text for example in examples for turn in example.turns if turn.text}
    assert said <= set(TEXTS)


@pytest.mark.slow
def test_every_stage_and_the_evaluation_run_on_own_data_alone(
    trained, without_storybook, watching, sampled, tmp_path
):
    folder, parts = trained
    eyes = {"image_adapter": str(folder / "sight" / "image_adapter.safetensors")}
    data = {"data": str(VIST), "format": "vist"}
    short = {**parts, **data, "steps": 2, "batch": 2, "image_from": 0.0, "preview_every": 2, "tracker": ""}

    align = make_recipe(AlignRecipe, **short)
    train_align(align, tmp_path / "align", watching(align))
    assert_of_the_sample(sampled)

    sampled.clear()
    tasks = {name: {} for name in ("story", "picture_from_text", "text_and_picture", "understanding")}
    finetune = make_recipe(FinetuneRecipe, **short, **eyes, tasks=tasks, shown_share=1.0)
    assert finetune.data.questions == 2  # of the storybook, which is not what is trained on
    llm, _ = train_finetune(finetune, tmp_path / "told", watching(finetune), tmp_path / "align")
    assert llm.has_vision
    assert_of_the_sample(sampled)
    shown = [
        turn
        for step in sampled
        for one in step["text"]
        for turn in one.turns
        if turn.image_tokens is not None
    ]
    assert shown

    sampled.clear()
    mapper = make_recipe(MapperRecipe, **short, **eyes, stories=3)
    train_mapper(mapper, tmp_path / "mapper", watching(mapper), tmp_path / "told")
    assert_of_the_sample(sampled)
    assert len(sampled) == 1 and len(sampled[0]["text"]) == 3
    assert load_mapper(tmp_path / "mapper" / "mapper.safetensors")[1].trained["data"] == VIST.name

    recipe = EvaluateRecipe(
        **parts, **data, **eyes, adapter=str(tmp_path / "told" / "adapter"), stories=1, steps=1, write=False,
        mapper=str(tmp_path / "mapper" / "mapper.safetensors"),
    )  # fmt: skip
    report = evaluate(recipe, tmp_path / "report")
    assert set(report["rows"]) == {"vokens", "two_stage", "oracle"} and report["settings"]["scenes"] == 5
    assert (tmp_path / "told" / "preview_000002.png").is_file()


@pytest.mark.slow
def test_a_mapper_says_what_its_data_lacks(trained, tmp_path):
    folder, parts = trained
    data = {"data": str(VIST), "format": "vist", "tasks": {"understanding": {}}}
    recipe = make_recipe(
        MapperRecipe,
        **parts,
        **data,
        stories=2,
        image_adapter=str(folder / "sight" / "image_adapter.safetensors"),
    )
    with pytest.raises(BadInputError, match="None of 2 examples of val_cleaned.json asks for a picture"):
        train_mapper(recipe, tmp_path / "mapper", open_records(recipe), folder / "align")


def test_a_tracker_keeps_the_run_under_the_packs_name():
    from trainer.training.checkpoint import _project

    assert (_project("wandb"), _project("tensorboard")) == ("minigpt5", "tensorboard")


def test_the_storybook_is_really_gone(without_storybook):
    with pytest.raises(ModuleNotFoundError, match="was imported"):
        __import__("trainer.storybook.world.source")
