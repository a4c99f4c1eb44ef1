"""A step split among processes, or into parts: the same examples, losses and gradient as in one piece."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_llm
from minigpt5_core.llm.precision import dtype_and_quantization
from tests.stages import as_settings, train_align, train_finetune, train_mapper, values_of
from trainer.cli import open_source
from trainer.common.recipe import change_recipe, make_recipe
from trainer.data.record_source import RecordSource
from trainer.data.source import Shard
from trainer.data.stream import Stream
from trainer.data.tasks import Task
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneData, FinetuneRecipe
from trainer.stages.mapper import MapperRecipe
from trainer.storybook.world.export import export_stories
from trainer.storybook.world.source import StorySource

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def align_recipe(tiny_llm_folder, tiny_diffusion_folder):
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), captions=8, steps=4, batch=4,
        image_from=0.0, preview_every=100, save_every=100, dropout=0.3, tracker="",
    )  # fmt: skip


@pytest.fixture
def finetune_recipe(tiny_llm_folder, tiny_diffusion_folder, tmp_path):
    return make_recipe(FinetuneRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), steps=4, batch=4, lora_dropout=0.0,
        image_from=0.0, preview_every=100, save_every=100, dropout=0.3, tracker="",
        data=str(export_stories("jsonl", 6, 3, tmp_path / "data")),
    )  # fmt: skip


@pytest.fixture
def world_recipe(finetune_recipe):
    """The same on the storybook's world, whose captions by themselves are a text loss more."""
    return change_recipe(finetune_recipe, data="", stories=6, captions=3)


def curve(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_curve(first, second, tolerance=1e-4):
    one, other = curve(first), curve(second)
    assert len(one) == len(other) > 0
    for here, there in zip(one, other, strict=True):
        assert here.keys() == there.keys()
        assert all(here[name] == pytest.approx(there[name], rel=tolerance) for name in here), (here, there)


def same_weights(first, second, atol):
    for name in ("mapper.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(out / name) for out in (first, second))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=atol)


def as_text(examples):
    return [
        ([(turn.request, turn.text) for turn in one.turns], [target.seed for target in one.targets])
        for one in examples
    ]


@pytest.mark.parametrize("kind", ["world", "records"])
def test_processes_share_what_one_draws_and_draw_nothing_twice(kind, tiny_llm, tmp_path):
    path = export_stories("jsonl", 8, 3, tmp_path / "data")

    def source():
        if kind == "world":
            return StorySource(tiny_llm, FinetuneData(stories=8), 3)
        tasks = {"story": Task(), "picture_from_text": Task()}
        return RecordSource(tiny_llm, Stream(path, "jsonl", 5), tasks)

    whole, first, second = source(), source(), source()
    for step in range(5):
        one, *halves = (
            as_text(some.sample(5, random.Random(step), shard)["text"])
            for some, shard in ((whole, Shard()), (first, Shard(0, 2)), (second, Shard(1, 2)))
        )
        assert halves == [one[0::2], one[1::2]]
        if step == 0:  # later an epoch may end in between
            assert len({str(texts) for texts, _ in one}) == 5


@pytest.mark.slow
def test_parts_of_a_batch_give_the_whole_batchs_gradient(align_recipe, world_recipe, tmp_path):
    train_align(align_recipe, tmp_path / "whole")
    train_align(change_recipe(align_recipe, accumulation=3), tmp_path / "parts")
    same_curve(tmp_path / "whole", tmp_path / "parts")
    train_finetune(world_recipe, tmp_path / "told")
    train_finetune(change_recipe(world_recipe, accumulation=4), tmp_path / "told_parts")
    assert {"text", "caption_text", "caption", "image"} < set(curve(tmp_path / "told")[0])
    same_curve(tmp_path / "told", tmp_path / "told_parts")


def command(stage, recipe, out, processes, *options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *options]
    return [sys.executable, *launch, "-m", "trainer", stage, "--out", str(out), *as_settings(recipe)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_two_processes_give_the_loss_curve_of_one(stage, align_recipe, finetune_recipe, tmp_path):
    recipe, run = {"align": (align_recipe, train_align), "finetune": (finetune_recipe, train_finetune)}[stage]
    recipe = change_recipe(recipe, save_every=2)
    every = {"open_source": open_source(recipe)}  # as the two processes have it
    run(recipe, tmp_path / "one", **every)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(stage, recipe, tmp_path / "two", 2),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4/4") == 1  # one of them speaks
    same_curve(tmp_path / "one", tmp_path / "two")
    same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4)
    (tmp_path / "two/states/step_000004").rename(tmp_path / "gone")
    run(recipe, tmp_path / "two", resume=True, **every)  # what two began, one can end
    same_curve(tmp_path / "one", tmp_path / "two")
    same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_an_llm_spread_over_processes_gives_the_loss_curve_of_a_whole_one(
    stage, align_recipe, world_recipe, tmp_path
):
    recipe, run = {"align": (align_recipe, train_align), "finetune": (world_recipe, train_finetune)}[stage]
    recipe = change_recipe(recipe, shard_llm=True, preview_every=4)
    if stage == "finetune":  # the second process has none of the captions, and runs all the same
        recipe = change_recipe(recipe, captions=1, gradient_checkpointing=True)
    run(recipe, tmp_path / "whole", open_source=open_source(recipe))  # one process has nobody to share with
    done = subprocess.run(
        command(stage, recipe, tmp_path / "spread", 2),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    here, whole = (
        int(found.replace(",", ""))
        for found in re.search(r"holds (\S+) of its (\S+) par", done.stdout).groups()
    )
    assert here < 0.8 * whole  # the embeddings, a large part of so small an LLM, stay whole
    same_curve(tmp_path / "whole", tmp_path / "spread")
    same_weights(tmp_path / "whole", tmp_path / "spread", atol=2e-4)
    assert (tmp_path / "spread/preview_000004.png").is_file()


def test_what_accelerate_would_cut_up_is_refused(align_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(BadInputError, match="set up for FSDP.*shard_llm=true"):
        train_align(align_recipe, tmp_path)


@pytest.mark.slow
def test_a_run_that_loses_a_process_starts_again_from_its_newest_state(align_recipe, tmp_path):
    recipe = change_recipe(align_recipe, steps=14, save_every=2)
    # or, with torch 2.13, the new processes would find the lost ones' addresses in the old store
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        command("align", recipe, tmp_path / "two", 2, "--max_restarts", "1"),
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "two/states/step_000004/step.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    metrics = tmp_path / "two/metrics.jsonl"
    first, *rest = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(
        first.replace("{", '{"kept": 1, ', 1) + "".join(rest)
    )  # a run begun anew would not have it
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "trainer align"], capture_output=True, text=True
    )
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    errors = process.communicate(timeout=280)[1]
    assert process.returncode == 0, errors[-3000:]
    assert '"kept": 1' in metrics.read_text()
    metrics.write_text(metrics.read_text().replace('"kept": 1, ', ""))
    train_align(recipe, tmp_path / "one", open_source=open_source(recipe))
    same_curve(tmp_path / "one", tmp_path / "two")
    assert [line["step"] for line in curve(tmp_path / "two")] == list(range(1, 15))


def test_more_processes_than_examples_are_refused(align_recipe, tmp_path):
    with pytest.raises(BadInputError, match="batch is 4, for 1 processes with 5 parts each.*Set batch=5"):
        train_align(change_recipe(align_recipe, accumulation=5), tmp_path)


@pytest.mark.slow
def test_the_result_is_the_average_over_the_steps(align_recipe, tmp_path):
    recipe = change_recipe(align_recipe, ema_decay=0.5, save_every=1, keep=10)
    train_align(recipe, tmp_path / "run")
    states = [load_file(tmp_path / f"run/states/step_00000{n}/model.safetensors") for n in (1, 2, 3, 4)]
    name = "mapper.queries"
    train_align(change_recipe(recipe, steps=1, warmup=0.0, mapper_lr=0.0, voken_lr=0.0), tmp_path / "start")
    average = load_file(tmp_path / "start/states/step_000001/model.safetensors")[name]
    for step, state in enumerate(states):  # the decay grows to its full value: Karras et al.'s warm-up
        decay = min(0.5, 1 - (1 + step) ** -0.75) if step else 0.0
        average = decay * average + (1 - decay) * state[name]
    found = load_file(tmp_path / "run" / "mapper.safetensors")["queries"]
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
    assert (found - states[-1][name]).abs().max() > 1e-5


@pytest.mark.slow
def test_an_average_goes_on_where_it_stood(align_recipe, tmp_path):
    recipe = change_recipe(align_recipe, ema_decay=0.9, save_every=2)
    train_align(recipe, tmp_path / "whole")
    train_align(recipe, tmp_path / "parts")
    newest = tmp_path / "parts" / "states" / "step_000004"
    newest.rename(tmp_path / "gone")
    train_align(recipe, tmp_path / "parts", resume=True)
    same_weights(tmp_path / "whole", tmp_path / "parts", atol=0)


@pytest.mark.slow
def test_checkpointing_changes_no_number(finetune_recipe, tmp_path):
    train_finetune(finetune_recipe, tmp_path / "plain")
    train_finetune(change_recipe(finetune_recipe, gradient_checkpointing=True), tmp_path / "saving")
    same_curve(tmp_path / "plain", tmp_path / "saving", tolerance=1e-5)
    with pytest.raises(BadInputError, match="does not go with adapter=prefix"):
        train_finetune(
            change_recipe(finetune_recipe, gradient_checkpointing=True, adapter="prefix"), tmp_path
        )


@pytest.fixture
def fresh_accelerate():
    """accelerate takes a process's first precision for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_bf16_trains_close_to_float32_and_keeps_float32_weights(finetune_recipe, tmp_path, fresh_accelerate):
    train_finetune(finetune_recipe, tmp_path / "full")
    fresh_accelerate(reset_partial_state=True)
    train_finetune(change_recipe(finetune_recipe, precision="bf16"), tmp_path / "half")
    first, half = (curve(tmp_path / name)[0] for name in ("full", "half"))
    assert all(half[name] == pytest.approx(first[name], rel=0.05) for name in first)
    assert any(half[name] != first[name] for name in first)
    mapper = load_file(tmp_path / "half" / "mapper.safetensors")
    assert {tensor.dtype for tensor in mapper.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"llm_precision": "4bit", "optimizer": "adamw8bit"}, {"llm_precision": "bf16"}]
)
def test_an_llm_held_small_learns_and_is_not_changed(finetune_recipe, tmp_path, changes):
    recipe = change_recipe(finetune_recipe, steps=6, warmup=0.0, **changes)
    llm, _ = train_finetune(recipe, tmp_path)
    table = llm.causal_lm.get_base_model() if hasattr(llm.causal_lm, "get_base_model") else llm.causal_lm
    kept = [part.weight for name, part in table.named_modules() if name.endswith("q_proj.base_layer")]
    assert {weight.dtype for weight in kept} == {torch.uint8 if "optimizer" in changes else torch.bfloat16}
    held = values_of(recipe, "llm", "diffusion", "llm_precision")
    fresh = load_llm(Path(held["llm"]), **dtype_and_quantization(held["llm_precision"]))
    before = [part.weight for name, part in fresh.causal_lm.named_modules() if name.endswith("q_proj")]
    assert len(before) == len(kept) and all(torch.equal(*pair) for pair in zip(before, kept, strict=True))
    lines = curve(tmp_path)
    assert lines[-1]["caption"] < lines[0]["caption"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    alone = make_recipe(
        MapperRecipe, **held, stories=1, captions=2, steps=2, batch=2, caption_weight=1.0, image_weight=0.0
    )
    train_mapper(
        alone, tmp_path / "mapper", tmp_path
    )  # on the states of the LLM as it is held, adapter laid on
    assert (tmp_path / "mapper" / "mapper.safetensors").is_file()


def test_what_is_not_installed_is_named(align_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BadInputError, match="pip install bitsandbytes, or set optimizer=adamw"):
        train_align(change_recipe(align_recipe, optimizer="adamw8bit"), tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInputError, match="pip install bitsandbytes, or take bf16"):
        train_align(change_recipe(align_recipe, llm_precision="4bit"), tmp_path)


def test_settings_that_do_nothing_are_refused(align_recipe):
    with pytest.raises(BadInputError, match="gradient_checkpointing needs data"):
        change_recipe(align_recipe, gradient_checkpointing=True)
    for idle in (
        {"gradient_checkpointing": True},
        {"shard_llm": True},
    ):
        with pytest.raises(BadInputError, match=next(iter(idle))):
            make_recipe(MapperRecipe, **idle)
    with pytest.raises(BadInputError, match="cache is set, but data is not"):
        change_recipe(align_recipe, cache="x")


def test_settings_that_are_none_are_refused(align_recipe):
    small = {"shard_llm": True, "llm_precision": "4bit"}
    for wrong in (
        {"optimizer": "lion"},
        {"precision": "fp16"},
        {"ema_decay": 1.0},
        {"accumulation": 0},
        small,
    ):
        with pytest.raises(BadInputError, match=next(iter(wrong))):
            change_recipe(align_recipe, **wrong)
