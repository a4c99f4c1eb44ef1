"""The recipes for real data sets and large models run as they are, but for their size: tiny models, two steps."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from minigpt5_core import conditioning
from tests.toy_diffusion import SPACES, save
from trainer.cli import main
from trainer.common.recipe import load_recipe
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe
from trainer.storybook.world.export import export_stories

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPES = Path(__file__).parents[1] / "trainer" / "recipes"
# stage, format, and the number of GPUs it is for
NAMED = {
    "cc3m_sd21": ("align", "cc3m", 4),
    "vist_lora": ("finetune", "vist", 4),
    "vist_prefix": ("finetune", "vist", 4),
    "mmdialog_lora": ("finetune", "mmdialog", 4),
    "own_stories_flux": ("finetune", "jsonl", 1),
    "own_stories_sd3": ("finetune", "jsonl", 1),
    "own_stories_sdxl": ("finetune", "jsonl", 1),
    "tiny_8gb": ("finetune", "jsonl", 1),
    "world_from_text": ("align", "jsonl", 1),
}
KINDS = {"align": AlignRecipe, "finetune": FinetuneRecipe}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate takes a process's first precision for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_has_work_for_the_gpus_it_speaks_of(name):
    stage, layout, gpus = NAMED[name]
    recipe = load_recipe(KINDS[stage], RECIPES / f"{name}.toml", ["data=x"])
    assert recipe.optim.batch >= gpus * recipe.optim.accumulation and recipe.data.format == layout
    assert max(map(len, (RECIPES / f"{name}.toml").read_text().splitlines())) <= 120


@pytest.fixture
def own_model(name, tiny_diffusion_folder, tmp_path, monkeypatch):
    """The tiny diffusion model's folder and space: the storybook's for all but Flux, whose is of its own classes."""
    if name != "own_stories_flux":
        return {"diffusion": str(tiny_diffusion_folder), "space": "storybook", "tokens": 77}
    save("flux", tmp_path / "flux")
    monkeypatch.setitem(conditioning.SPACES, "toy_flux", SPACES["flux"])
    return {"diffusion": str(tmp_path / "flux"), "space": "toy_flux", "picture_size": 16}


# one of each kind: voken rows alone, LoRA, a prefix, dialogues, and a model that predicts a velocity
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cc3m_sd21", "vist_lora", "vist_prefix", "mmdialog_lora", "own_stories_flux"]
)
def test_a_named_recipe_trains(name, tiny_llm_folder, own_model, tmp_path):
    stage, layout, _ = NAMED[name]
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
