"""What a training run keeps, and how it ends: interrupted, killed, out of disk, out of numbers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.errors import BadInputError
from tests.stages import as_settings, train_align
from trainer.cli import main, open_source
from trainer.common.progress import Progress, Terminated, TrainingError, interrupts
from trainer.common.provenance import fingerprint
from trainer.common.recipe import change_recipe, make_recipe
from trainer.diffusion import load_frozen_diffusion
from trainer.stages import align
from trainer.stages.align import AlignRecipe
from trainer.storybook.world.export import export_stories
from trainer.training.checkpoint import Run, start_accelerator
from trainer.training.run_summary import running_mean

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def recipe(tiny_llm_folder, tiny_diffusion_folder):
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), captions=8, steps=6, batch=2, image_weight=0.0,
        preview_every=100, save_every=1, keep=2,
    )  # fmt: skip


def states(out):
    return sorted(state.name for state in (out / "states").iterdir())


def same(first, second):
    for name in ("mapper.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(out / name) for out in (first, second))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.slow
def test_a_finished_run_explains_itself(recipe, tmp_path):
    train_align(recipe, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and {"caption", "text"} < set(lines[0])
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["stage"] == "align" and described["recipe"]["optim"]["steps"] == 6
    assert described["versions"]["torch"] == torch.__version__ and described["data"]["name"] == "storybook"
    text = (tmp_path / "README.md").read_text()
    assert f"| caption | {lines[-1]['caption']:.4f} |" in text and "Steps: 6, seed 0" in text
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert any((tmp_path / "tensorboard").rglob("events.*"))


def test_the_newest_states_and_the_best_one_are_kept(recipe, tmp_path):
    run = Run(recipe, tmp_path, start_accelerator(recipe, tmp_path), resume=False)
    for step, loss in enumerate((3.0, 1.0, 5.0, 4.0, 3.0, 2.0), start=1):
        run.save_state(step, loss)
    assert run.kept() == {2: 1.0, 5: 3.0, 6: 2.0}
    assert states(tmp_path) == ["step_000002", "step_000005", "step_000006"]


def open_run(recipe, out, resume=False):
    return Run(recipe, out, start_accelerator(recipe, out), resume)


def test_an_earlier_run_is_never_started_over_unasked(recipe, tmp_path):
    open_run(recipe, tmp_path).save_state(3, 1.0)
    with pytest.raises(BadInputError, match="saved after step 3.*--resume, name another folder, or delete"):
        open_run(recipe, tmp_path)
    assert states(tmp_path) == ["step_000003"]
    assert open_run(recipe, tmp_path, resume=True).resuming


def test_two_runs_never_write_into_one_folder(recipe, tmp_path):
    first, second = open_run(recipe, tmp_path / "run"), open_run(recipe, tmp_path / "run")
    first.begin("stories")
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    with pytest.raises(BadInputError, match="Another process is training into"):
        second.begin("stories")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "kept"
    first.end()
    second.begin("stories")
    second.end()


@pytest.mark.parametrize(
    "broken",
    ["", '{"step": 2', "[]", "3", '{"step": "2", "loss": 1.0}', '{"step": 1, "loss": 1.0}', "[" * 10**5],
)
def test_a_state_that_was_not_written_to_its_end_is_none(recipe, tmp_path, broken):
    run = open_run(recipe, tmp_path)
    for step in (1, 2):
        run.save_state(step, 1.0)
    (tmp_path / "states" / "step_000002" / "step.json").write_text(broken)
    asked = []
    assert open_run(recipe, tmp_path, resume=True).resume(asked.append) == 1
    assert [folder.name for folder in asked] == ["step_000001"]


@pytest.mark.parametrize(
    "cut", ['{"step": 3, "capt', "null", "\x00\x00", '{"step": 3, "caption": "x"}', "[" * 10**5]
)
def test_a_line_of_losses_that_the_power_went_off_in_does_not_count(recipe, tmp_path, cut):
    run = open_run(recipe, tmp_path)
    for step in (1, 2):
        run.log(step, {"caption": 1.0})
    run.save_state(2, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    run = open_run(recipe, tmp_path, resume=True)
    assert run.resume(lambda folder: None) == 2
    assert [line["step"] for line in run.metrics()] == [1, 2]
    run.log(3, {"caption": 0.5})
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_state_before(recipe, tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    train_align(recipe, tmp_path / "whole")
    plain = Accelerator.save_state

    def full(self, folder, **options):
        plain(self, folder, **options)
        if "step_000003" in states(tmp_path / "run"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patched,
        pytest.raises(TrainingError, match="No space left.*step 3 is safe.*--resume"),
    ):
        patched.setattr(Accelerator, "save_state", full)
        train_align(recipe, tmp_path / "run")
    assert states(tmp_path / "run") == ["step_000002", "step_000003"]
    train_align(recipe, tmp_path / "run", resume=True)
    same(tmp_path / "whole", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # the lost step is there once


@pytest.mark.slow
def test_a_loss_that_is_no_number_changes_nothing_and_says_what_is_safe(recipe, tmp_path):
    steps = []

    def load_broken(*given):
        diffusion = load_frozen_diffusion(*given)
        plain = diffusion.encode

        def encode(texts):
            answer = plain(texts)
            steps.extend(
                [1] if len(texts) == recipe.optim.batch else []
            )  # not those measured before training
            return Conditioning(answer.tokens * (float("nan") if len(steps) == 4 else 1))

        diffusion.encode = encode
        return diffusion

    with pytest.raises(TrainingError, match="step 4: the loss is nan.*after step 3"):
        train_align(recipe, tmp_path / "run", load_diffusion=load_broken)
    train_align(recipe, tmp_path / "run", resume=True)
    train_align(recipe, tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_cannot_go_on_ends_with_1(monkeypatch, tmp_path, capsys):
    def stop(*given):
        raise TrainingError("step 4: the loss is nan")

    monkeypatch.setattr(align, "train_align", stop)
    assert main(["align", "--out", str(tmp_path)]) == 1
    assert "stopped: step 4: the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_waits_for_the_end_of_the_step(number, kind):
    with interrupts() as caught:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert [type(one) for one in caught] == [kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_process_goes_on_as_if_nothing_had_been(recipe, tmp_path, number, code):
    """The real command: stopped after its second step, resumed, and compared with one that ran through."""
    data = export_stories("jsonl", 2, 3, tmp_path / "data")
    recipe = change_recipe(recipe, steps=15, data=str(data))
    command = [
        sys.executable, "-m", "trainer", "align", "--out", str(tmp_path / "run"), *as_settings(recipe)
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "states" / "step_000002" / "step.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == code, errors
    assert not (tmp_path / "run" / "mapper.safetensors").exists()
    assert main([*command[3:], "--resume"]) == 0
    train_align(recipe, tmp_path / "whole", open_source=open_source(recipe))
    same(tmp_path / "whole", tmp_path / "run")


def test_the_progress_line_says_memory(capsys):
    Progress(1).update(1, 4, caption=0.5)
    line = capsys.readouterr().out
    assert "caption 0.5000" in line and 0.05 < float(line.rsplit(" ", 2)[-2]) < 500 and line.endswith("GB\n")


def test_a_data_sets_fingerprint_is_of_names_sizes_and_contents(tmp_path):
    (tmp_path / "a.tsv").write_text("one")
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path) and len(first) == 16
    (tmp_path / "a.tsv").write_text("two")
    assert fingerprint(tmp_path) != first
    assert fingerprint(tmp_path / "gone") == ""


def test_a_running_mean_begins_at_the_first_value():
    assert running_mean([2.0, 4.0], rate=0.5) == [2.0, 3.0]
