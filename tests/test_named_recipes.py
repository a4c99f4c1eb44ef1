"""The recipes for real data sets and large models run as they are, but for their size: tiny models, two steps."""

import json
import tomllib
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from minigpt5_core import conditioning
from tests.toy_diffusion import SPACES, save
from trainer.cli import main
from trainer.storybook.world.export import export_stories

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
RECIPES = Path(__file__).parents[1] / "trainer" / "recipes"
NAMED = {
    "cc3m_sd21": ("align", "cc3m"),
    "vist_lora": ("finetune", "vist"),
    "vist_prefix": ("finetune", "vist"),
    "mmdialog_lora": ("finetune", "mmdialog"),
    "own_stories_flux": ("finetune", "jsonl"),
    "own_stories_sd3": ("finetune", "jsonl"),
    "own_stories_sdxl": ("finetune", "jsonl"),
    "tiny_8gb": ("finetune", "jsonl"),
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate takes a process's first precision for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_has_work_for_the_gpus_it_speaks_of(name):
    text = (RECIPES / f"{name}.toml").read_text()
    recipe = tomllib.loads(text)
    gpus = 4 if "of four GPUs" in text else 1
    assert recipe["batch"] >= gpus * recipe["accumulation"]
    assert max(map(len, text.splitlines())) <= 120


@pytest.fixture
def own_model(name, tiny_diffusion_folder, tmp_path, monkeypatch):
    """The tiny diffusion model's folder and space: the storybook's for all but Flux, whose is of its own classes."""
    if name != "own_stories_flux":
        return {"diffusion": str(tiny_diffusion_folder), "space": "storybook", "tokens": 77}
    save("flux", tmp_path / "flux")
    monkeypatch.setitem(conditioning.SPACES, "toy_flux", SPACES["flux"])
    return {"diffusion": str(tmp_path / "flux"), "space": "toy_flux", "picture_size": 16}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_trains(name, tiny_llm_folder, own_model, tmp_path):
    stage, layout = NAMED[name]
    data = export_stories(layout, 8, 3, tmp_path / "data")
    changes = {
        "data": str(data), "llm": str(tiny_llm_folder), **own_model, "steps": 2, "batch": 2, "accumulation": 2,
        "image_from": 0.0, "preview_every": 2, "prefix_width": 16, "tracker": "",
    }  # fmt: skip
    if stage == "align":
        changes.pop("prefix_width")
    settings = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = ["--recipe", str(RECIPES / f"{name}.toml")]
    assert main([stage, *recipe, *settings, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"text", "caption", "image"} <= set(lines[-1])
    assert load_file(tmp_path / "run" / "mapper.safetensors")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    kinds = {"cc3m_sd21": "TRAINABLE_TOKENS", "vist_prefix": "PREFIX_TUNING"}
    assert adapter["peft_type"] == kinds.get(name, "LORA")
