from dataclasses import dataclass

import pytest
import torch

from minigpt5_core.errors import BadInputError
from trainer.common.recipe import change_recipe, load_recipe, make_recipe
from trainer.stages.finetune import FinetuneRecipe


@dataclass(frozen=True)
class Inner:
    steps: int = 3


@dataclass(frozen=True)
class Outer:
    rate: float = 1e-3
    name: str = "x"
    widths: tuple = (1, 2)
    inner: Inner = Inner()


def test_a_recipe_is_read_from_toml_and_changed_by_hand(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("rate = 1\nwidths = [4, 5]\n[inner]\nsteps = 7\n")
    recipe = load_recipe(Outer, path, ["rate=2e-4", "name=some text", "inner.steps=9"])
    assert recipe == Outer(2e-4, "some text", (4, 5), Inner(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ratee=1", "unknown key 'ratee'. Valid keys: inner, name, rate, widths"),
        ("inner.step=1", "unknown key 'step'. Valid keys: steps"),
        ("rate=fast", "rate is 'fast', expected float"),
        ("rate", "has no '='"),
        ("rate=inf", "rate is inf; give a number that is finite"),
        ("rate=nan", "rate is nan; give a number that is finite"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(BadInputError, match=message):
        load_recipe(Outer, None, [change])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        load_recipe(Outer, tmp_path / "none.toml", [])
    (tmp_path / "broken.toml").write_text("rate = = 1")
    with pytest.raises(BadInputError, match="not valid TOML"):
        load_recipe(Outer, tmp_path / "broken.toml", [])


OLD = """# as recipes were written before there were tables
format = "vist"
data = "vist/train_cleaned.json"
space = "sd21"
steps = 4300
batch = 16
llm_precision = "bf16"
lora_rate = 1e-4
mapper_rate = 2e-4
row_rate = 3e-4
caption_weight = 0.1
preview_every = 100

[tasks.story]
weight = 2.0
"""
NEW = """
[model]
space = "sd21"
llm_precision = "bf16"
[data]
path = "vist/train_cleaned.json"
format = "vist"
[data.tasks.story]
weight = 2.0
[optim]
steps = 4300
batch = 16
lora_lr = 1e-4
mapper_lr = 2e-4
voken_lr = 3e-4
[loss]
caption_weight = 0.1
[run]
preview_every = 100
"""


@pytest.mark.trains
def test_a_stages_recipe_is_written_in_tables_or_as_it_was_before(tmp_path, capsys):
    from trainer.stages.finetune import FinetuneRecipe

    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / f"{name}.toml").write_text(text)
    old, new = (load_recipe(FinetuneRecipe, tmp_path / f"{name}.toml", []) for name in ("old", "new"))
    assert old == new and old.data.path == "vist/train_cleaned.json" and old.optim.voken_lr == 3e-4
    told = capsys.readouterr().out
    assert "row_rate is called voken_lr now, in the table [optim]" in told and "steps is called" not in told
    changes = ["batch=2", "optim.steps=3", "data=mine.jsonl", "tasks.story.weight=1", "mapper_rate=1"]
    for name in ("old", "new"):
        changed = load_recipe(FinetuneRecipe, tmp_path / f"{name}.toml", changes)
        assert (changed.optim.batch, changed.optim.steps, changed.optim.mapper_lr) == (2, 3, 1.0)
        assert (changed.data.path, changed.data.format) == ("mine.jsonl", "vist")
        assert changed.data.tasks == {"story": {"weight": 1}}


@pytest.mark.trains
def test_a_flat_key_that_nobody_knows_is_refused_with_all_that_are_known():
    from trainer.stages.align import AlignRecipe

    with pytest.raises(BadInputError, match=r"unknown key 'lora_lr'.* batch, .* seed, .*\[model\], \[data\]"):
        load_recipe(AlignRecipe, None, ["lora_lr=1"])
    with pytest.raises(BadInputError, match="optim: unknown key 'step'"):
        load_recipe(AlignRecipe, None, ["optim.step=1"])
    with pytest.raises(BadInputError, match="steps is 'many', expected int"):
        load_recipe(AlignRecipe, None, ["steps=many"])


@pytest.mark.trains
def test_a_recipe_is_made_and_changed_by_flat_names():
    from trainer.stages.align import AlignRecipe

    made = make_recipe(AlignRecipe, steps=3, seed=5, captions=7)
    assert (made.optim.steps, made.run.seed, made.data.captions) == (3, 5, 7)
    changed = change_recipe(made, steps=4, data="x")
    assert (changed.optim.steps, changed.run.seed, changed.data.path) == (4, 5, "x") and made.optim.steps == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((f"{name}=-1e-9", f"{name} is -1e-09; it must be 0 or more, and finite") for name in (
            "mapper_lr", "voken_lr", "lora_lr", "weight_decay", "text_weight", "image_weight", "caption_weight",
            "image_from", "min_snr_gamma",
        )),
        *((f"{name}=1.1", f"{name} is 1.1; it must be 0 or more, and at most 1") for name in (
            "warmup", "dropout", "lora_dropout", "shown_share",
        )),
        ("warmup=-1", "warmup is -1"),
        ("lora_rank=0", "lora_rank is 0; it must be 1 or more"),
        ("caption_weight=inf", "caption_weight is inf"),
        ("mapper_lr=nan", "mapper_lr is nan"),
    ],
)  # fmt: skip
def test_a_number_that_no_training_can_use_is_refused(change, said):
    with pytest.raises(BadInputError, match=said):
        load_recipe(FinetuneRecipe, None, [change])


@pytest.mark.parametrize(
    ("changes", "device", "fused"),
    [
        ([], "cpu", True),
        (["precision=bf16"], "cpu", False),
        (["llm_precision=bf16"], "cpu", False),
        (["precision=bf16"], "cuda", True),
    ],
)
def test_attention_is_plain_where_the_fused_one_is_slow(changes, device, fused):
    from trainer.training.loop import attention_for

    with attention_for(load_recipe(FinetuneRecipe, None, changes), torch.device(device))():
        assert torch.backends.cuda.flash_sdp_enabled() is fused
    assert torch.backends.cuda.flash_sdp_enabled()
