"""--resume reads a saved state without running anything in it, and refuses one that is not whole."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.errors import BadInputError
from tests.stages import stopping_source, train_align
from trainer.common.recipe import change_recipe, make_recipe
from trainer.stages.align import AlignRecipe
from trainer.storybook.world.export import export_stories
from trainer.training.state import Parts, load_optimizer, load_random, read_pickle, resuming

pytestmark = pytest.mark.filterwarnings("ignore")


class Place:
    """A source of data that counts."""

    def __init__(self):
        self.state = {"stream": {"epoch": 0, "taken": 0, "skipped": 0}, "unused": 0}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Toy:
    """What a run saves, of a layer with 3 weights, after so many steps."""

    def __init__(self, steps=0):
        torch.manual_seed(steps)
        self.layer = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.01)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 2, 10)
        self.average = EMAModel(self.layer.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
        self.parts = Parts(self.schedule, Place(), self.average)
        for step in range(steps):
            self.layer(torch.randn(2, 3)).sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.average.step(self.layer.parameters())
            self.parts.source.state = {"stream": {"epoch": 0, "taken": 3 * step, "skipped": 1}, "unused": 2}

    def save(self, folder):
        self.parts.save(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.bin")
        torch.save(random_states(), folder / "random_states_0.pkl")

    def load(self, folder):
        with resuming(folder):
            load_optimizer(self.optimizer, folder)
            self.parts.load(folder)
            load_random(folder, 0)


def random_states(**others):
    """As accelerate saves them."""
    states = {
        "step": 0, "random_state": random.getstate(), "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }  # fmt: skip
    return states | others


@pytest.fixture
def saved(tmp_path):
    Toy(5).save(tmp_path)
    return tmp_path


def test_every_part_comes_back_to_the_last_bit(saved):
    drawn = random.random(), np.random.rand(), torch.rand(1).item()  # right behind the saving
    whole, again = Toy(5), Toy()
    again.load(saved)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert again.schedule.state_dict() == whole.schedule.state_dict()
    assert again.parts.source.state == whole.parts.source.state == {
        "stream": {"epoch": 0, "taken": 12, "skipped": 1}, "unused": 2,
    }  # fmt: skip
    found, expected = again.average.state_dict(), whole.average.state_dict()
    for one, other in zip(found.pop("shadow_params"), expected.pop("shadow_params"), strict=True):
        assert torch.equal(one, other)
    assert found == expected and found["optimization_step"] == 5
    rates = [group["lr"] for group in again.optimizer.param_groups]
    assert rates == [group["lr"] for group in whole.optimizer.param_groups]


def test_our_own_files_are_json_and_safetensors(saved):
    assert json.loads((saved / "schedule.json").read_text())["last_epoch"] == 5
    assert sorted(file.name for file in saved.iterdir()) == [
        "average.safetensors", "optimizer.bin", "random_states_0.pkl", "schedule.json", "source.json",
    ]  # fmt: skip


def as_before(saved, toy):
    """The same state as earlier versions wrote it: a pickle for each of our parts."""
    for index, part in enumerate((toy.schedule, toy.parts.source, toy.average)):
        torch.save(part.state_dict(), saved / f"custom_checkpoint_{index}.pkl")
    for name in ("schedule.json", "source.json", "average.safetensors"):
        (saved / name).unlink()


def test_a_state_of_the_version_before_is_read(saved):
    whole, again = Toy(5), Toy()
    as_before(saved, whole)
    again.load(saved)
    assert again.schedule.state_dict() == whole.schedule.state_dict()
    assert again.parts.source.state == whole.parts.source.state
    assert all(map(torch.equal, again.average.shadow_params, whole.average.shadow_params))


@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "random_states_0.pkl", *(f"custom_checkpoint_{index}.pkl" for index in range(3))],
)
@pytest.mark.parametrize("kind", ["torch", "plain", "inside"])
def test_a_planted_pickle_is_refused_and_not_run(saved, tmp_path, name, kind):
    as_before(saved, Toy(5))
    hostile = Hostile(tmp_path / "PWNED")
    if kind == "plain":
        (saved / name).write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save(hostile if kind == "torch" else {"step": 0, "random_state": hostile}, saved / name)
    with pytest.raises(BadInputError, match=rf"{name} is not loaded: .*run code \(posix.system\).*hostile"):
        Toy().load(saved)
    assert not (tmp_path / "PWNED").exists()


def test_a_planted_pickle_that_has_no_place_any_more_is_not_even_read(saved, tmp_path):
    for name in (
        "custom_checkpoint_0.pkl",
        "scheduler.bin",
        "sampler.bin",
        "scaler.pt",
        "random_states_1.pkl",
    ):
        (saved / name).write_bytes(pickle.dumps(Hostile(tmp_path / "PWNED"), protocol=2))
    Toy().load(saved)
    assert not (tmp_path / "PWNED").exists()


MERSENNE = np.random.RandomState(0).get_state()


@pytest.mark.parametrize(
    "states",
    [
        None, [], {}, 3, random_states(random_state=None), random_states(random_state=(3, (1, 2), None)),
        random_states(random_state=(3, (*range(624), 10**9), None)), random_states(torch_manual_seed=torch.zeros(3)),
        random_states(torch_manual_seed=torch.zeros(5056, dtype=torch.uint8)), random_states(numpy_random_seed="x"),
        random_states(numpy_random_seed=("MT19937", MERSENNE[1], 10**6, 0, 0.0)),
        random_states(numpy_random_seed=("MT19937", MERSENNE[1], -5, 0, 0.0)),
        random_states(numpy_random_seed=("MT19937", MERSENNE[1][:5], 3, 0, 0.0)),
        random_states(numpy_random_seed=("MT19937", 0 * MERSENNE[1], 3, 0, 0.0)),
    ],
    ids=range(14),
)  # fmt: skip
def test_garbage_for_random_states_is_refused(saved, states):
    torch.save(states, saved / "random_states_0.pkl")
    with pytest.raises(BadInputError, match="--resume: the state in .* cannot be gone on from"):
        Toy().load(saved)


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\x03\x04garbage", b"\x80\x02N."])
@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin"])
def test_a_file_that_is_cut_or_gone_is_refused(saved, name, content):
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    with pytest.raises(BadInputError, match="--resume"):
        Toy().load(saved)


def test_a_process_that_is_new_has_random_states_of_its_own(saved):
    load_random(saved, 1)
    (saved / "random_states_1.pkl").write_bytes(b"garbage")
    with pytest.raises(BadInputError), resuming(saved):
        load_random(saved, 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("schedule.json", "source.json")
            for text in (None, "", "{", "[]", "3", "[" * 10**5)
        ),
        ("schedule.json", {"last_epoch": None}),
        ("schedule.json", {"last_epoch": -1}),
        ("schedule.json", {"last_epoch": 2.5}),
        ("schedule.json", {"base_lrs": []}),
        ("schedule.json", {"_last_lr": [float("nan")]}),
        ("schedule.json", {"_last_lr": ["0.1"]}),
        ("source.json", {"unused": -1}),
        ("source.json", {"unused": True}),
        ("source.json", {"unused": 10**30}),
        ("source.json", {"more": 1}),
        ("source.json", {"stream": {"epoch": 0, "taken": 0}}),
    ],
)
def test_garbage_for_our_own_parts_is_refused(saved, name, content):
    file = saved / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInputError, match="--resume: the state in .* cannot be gone on from"):
        Toy().load(saved)


def test_nothing_else_of_a_schedule_is_taken_over(saved):
    file = saved / "schedule.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"step": 3, "lr_lambdas": [{"func": 3}], "optimizer": 4})
    )
    toy = Toy()
    toy.load(saved)
    toy.schedule.step()
    assert toy.schedule.last_epoch == 6 and toy.schedule.optimizer is toy.optimizer


@pytest.mark.parametrize("change", ["less", "shape", "nan", "header", "cut", "number"])
def test_garbage_for_the_average_is_refused(saved, change):
    file = saved / "average.safetensors"
    weights, numbers = load_file(file), Toy(5).average.state_dict()
    numbers.pop("shadow_params")
    if change == "less":
        weights.pop("1")
    if change == "shape":
        weights["0"] = weights["0"].T.contiguous()
    if change == "nan":
        weights["0"][0, 0] = float("nan")
    if change == "number":
        numbers["optimization_step"] = "5"
    header = None if change == "header" else {"minigpt5.average": json.dumps(numbers)}
    save_file(weights, file, header)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInputError, match="--resume: the state in .* cannot be gone on from"):
        Toy().load(saved)


def test_arrays_and_plain_values_are_read(tmp_path):
    values = {"a": np.arange(3, dtype=np.uint32), "b": [1, 2.5, "c", None, b"\xff"], "c": torch.ones(2)}
    torch.save(values, tmp_path / "a.pkl")
    found = read_pickle(tmp_path / "a.pkl")
    assert found["a"].tolist() == [0, 1, 2] and found["b"] == values["b"] and found["c"].tolist() == [1, 1]


# whole runs


@pytest.fixture
def recipe(tiny_llm_folder, tiny_diffusion_folder, tmp_path):
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), captions=4, steps=4, batch=2, image_weight=0.0,
        preview_every=100, save_every=2, ema_decay=0.9, dropout=0.3, tracker="",
        data=str(export_stories("jsonl", 6, 3, tmp_path / "data")),
    )  # fmt: skip


def losses(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop_after_two(recipe, out):
    with pytest.raises(KeyboardInterrupt):
        train_align(recipe, out, open_source=stopping_source(recipe, after=2))
    return out / "states" / "step_000002"


def write_as_before(state):
    """Writes a run's state anew as earlier versions did: a pickle for each of our parts."""
    schedule, source = (json.loads((state / name).read_text()) for name in ("schedule.json", "source.json"))
    with safe_open(state / "average.safetensors", framework="pt") as file:
        numbers = json.loads(file.metadata()["minigpt5.average"])
        weights = [file.get_tensor(name) for name in sorted(file.keys(), key=int)]
    parts = (
        schedule | {"lr_lambdas": [None] * len(schedule["base_lrs"])},
        source,
        numbers | {"shadow_params": weights},
    )
    for index, part in enumerate(parts):
        torch.save(part, state / f"custom_checkpoint_{index}.pkl")
    for name in ("schedule.json", "source.json", "average.safetensors"):
        (state / name).unlink()


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize("version", ["this", "before"])
def test_a_resumed_run_has_the_losses_of_one_that_ran_through(recipe, tmp_path, version):
    train_align(recipe, tmp_path / "whole")
    state = stop_after_two(recipe, tmp_path / "parts")
    if version == "before":
        write_as_before(state)
    ours = {"schedule.json", "source.json", "average.safetensors"}
    assert ours & {file.name for file in state.iterdir()} == (ours if version == "this" else set())
    assert bool(list(state.glob("custom_checkpoint_*"))) == (version == "before")
    train_align(recipe, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 4
    whole, parts = (load_file(tmp_path / out / "mapper.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.trains
def test_the_command_refuses_a_planted_pickle(recipe, tmp_path):
    recipe = change_recipe(recipe, ema_decay=0.0)
    state = stop_after_two(recipe, tmp_path / "run")
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        kept = (state / name).read_bytes() if (state / name).is_file() else None
        (state / "schedule.json").rename(state / "away") if kept is None else None
        torch.save(Hostile(tmp_path / "PWNED"), state / name)
        with pytest.raises(BadInputError, match=f"{name} is not loaded"):
            train_align(recipe, tmp_path / "run", resume=True)
        if kept is not None:
            (state / name).write_bytes(kept)
    assert not (tmp_path / "PWNED").exists()
