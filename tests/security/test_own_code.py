"""Model folders that bring code: it is never run, nobody is asked, and what can be read without it is read."""

import builtins
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, FalconConfig, FalconForCausalLM

from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_llm
from minigpt5_core.own_code import check_folder
from trainer.llm.adapters import check_peft
from trainer.metrics.weights import companion, pretrained
from trainer.storybook.models.diffusion import StorybookDiffusionRecipe, train_storybook_diffusion

PLANTED = "import pathlib\npathlib.Path({!r}).touch()\nclass Planted: pass\nclass diffusers: pass\n"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nobody_asks_and_nothing_runs(monkeypatch, tmp_path):
    """Whoever asks is told yes, and what then ran would leave a file."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    assert not asked
    assert not (tmp_path / "PWNED").exists()


@pytest.fixture
def plant(tmp_path):
    """Writes a module that would leave a file."""

    def write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PLANTED.format(str(tmp_path / "PWNED")))

    return write


@pytest.fixture
def llm(tiny_llm_folder, tmp_path, plant):
    folder = shutil.copytree(tiny_llm_folder, tmp_path / "llm")
    plant(folder / "planted.py")
    return folder


def amend(file, **values):
    said = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(said | values))


def test_auto_map_beside_a_class_that_is_known_is_passed_over(llm, tiny_llm_folder):
    """Many real folders carry it."""
    code = {
        "AutoConfig": "planted.Planted",
        "AutoModelForCausalLM": "planted.Planted",
        "AutoModel": "planted.Planted",
    }
    amend(llm / "config.json", auto_map=code)
    amend(llm / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "planted.Planted"]})
    plain, again = load_llm(tiny_llm_folder), load_llm(llm)
    assert again.encode("Mia the fox.") == plain.encode("Mia the fox.")
    assert all(
        torch.equal(one, other)
        for one, other in zip(plain.causal_lm.parameters(), again.causal_lm.parameters(), strict=True)
    )


def test_auto_map_elsewhere_on_the_hub_is_passed_over_too(llm):
    amend(llm / "config.json", auto_map={"AutoModelForCausalLM": "evil/repository--planted.Planted"})
    load_llm(llm)


@pytest.fixture
def falcon(llm):
    """A kind that transformers has no tokenizer class for: it goes by the tokenizer's own."""
    rows = len(AutoTokenizer.from_pretrained(llm))
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    FalconForCausalLM(FalconConfig(vocab_size=rows, **sizes)).save_pretrained(llm)
    return llm


@pytest.mark.parametrize(
    "code", [[None, "planted.Planted"], ["planted.Planted", None], ["evil/repo--planted.Planted", None]]
)
def test_a_tokenizer_that_needs_its_own_code_is_refused(falcon, code):
    load_llm(falcon)
    amend(falcon / "tokenizer_config.json", tokenizer_class="Planted", auto_map={"AutoTokenizer": code})
    with pytest.raises(
        BadInputError, match=r"needs Python code of its own \(auto_map in tokenizer_config.json\)"
    ):
        load_llm(falcon)


def test_a_kind_of_its_own_is_refused_and_its_code_named(llm):
    code = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    amend(llm / "config.json", model_type="planted", auto_map=code)
    with pytest.raises(
        BadInputError, match=r"needs Python code of its own \(auto_map in config.json\).*transformers reads"
    ):
        load_llm(llm)


@pytest.mark.parametrize("auto_map", ["planted.Planted", ["planted.Planted"], 3, {"AutoTokenizer": 3}])
def test_an_auto_map_of_another_shape_is_a_sentence(falcon, auto_map):
    amend(falcon / "tokenizer_config.json", tokenizer_class="Planted", auto_map=auto_map)
    with pytest.raises(BadInputError):
        load_llm(falcon)


@pytest.mark.parametrize(
    "place", ["attn_implementation", "_attn_implementation", "experts_implementation", "nested"]
)
def test_a_kernel_from_the_hub_is_refused(llm, place):
    """transformers would fetch it and run it."""
    kernel = {"attn_implementation": {"": "evil/kernel:attention"}}
    amend(
        llm / "config.json",
        **({"text_config": kernel} if place == "nested" else {place: "evil/kernel:attention"}),
    )
    with pytest.raises(BadInputError, match="asks for the kernel 'evil/kernel:attention'"):
        load_llm(llm)


def test_a_plain_kind_of_attention_is_let_through(llm):
    amend(llm / "config.json", attn_implementation="eager")
    load_llm(llm)


def test_an_llm_with_an_adapter_beside_it_is_refused(llm, tmp_path):
    """transformers would go to the base that the adapter names, and lets PEFT read it."""
    amend(llm / "adapter_config.json", base_model_name_or_path=str(tmp_path / "elsewhere"), peft_type="LORA")
    with pytest.raises(BadInputError, match="holds an adapter too"):
        load_llm(llm)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "..\\m.safetensors", "model.bin", 3, None]
)
def test_an_index_of_weights_names_files_beside_it(llm, name):
    amend(llm / "model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": name})
    with pytest.raises(BadInputError, match="expected .safetensors files beside it"):
        check_folder(llm)


def test_scores_models_bring_no_code_either(llm):
    """A model of a known kind loads; one that needs its code is refused, and so is its tokenizer."""
    amend(llm / "config.json", auto_map={"AutoModel": "planted.Planted", "AutoConfig": "planted.Planted"})
    pretrained(AutoModel, llm, CPU)
    amend(llm / "config.json", model_type="planted")
    for load in (lambda: pretrained(AutoModel, llm, CPU), lambda: companion(AutoTokenizer, llm)):
        amend(
            llm / "tokenizer_config.json",
            tokenizer_class="Planted",
            auto_map={"AutoTokenizer": ["planted.Planted", None]},
        )
        with pytest.raises(BadInputError, match="needs Python code of its own"):
            load()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "its megatron_config is"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/x"},
            "its peft_type is",
        ),
        ({"peft_type": ["LORA"]}, "its peft_type is"),
        ({"corda_config": {"cache_file": "/x"}}, "its corda_config is"),
    ],
)
def test_an_adapter_for_peft_imports_nothing(tmp_path, values, why):
    (tmp_path / "adapter_model.safetensors").touch()
    amend(
        tmp_path / "adapter_config.json", peft_type="LORA", megatron_core="megatron.core", corda_config=None
    )
    check_peft(tmp_path)
    amend(tmp_path / "adapter_config.json", **values)
    with pytest.raises(BadInputError, match=why):
        check_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInputError, match="no adapter_model.safetensors"):  # or PEFT would ask the Hub
        check_peft(tmp_path)


# diffusers


@pytest.fixture
def diffusion(tiny_diffusion_folder, tmp_path):
    return shutil.copytree(tiny_diffusion_folder, tmp_path / "diffusion")


def refused(folder, why):
    for load in (
        load_diffusion,
        lambda place: train_storybook_diffusion(StorybookDiffusionRecipe(), place / "out", place),
    ):
        with pytest.raises(BadInputError, match=why):
            load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet", ["planted", "Planted"]),
        ("unet", ["os", "system"]),
        ("unet", ["planted.sub", "Planted"]),
        ("unet", ["../planted", "Planted"]),
        ("unet", ["diffusers", "../Planted"]),
        ("unet", ["diffusers", None]),
        ("unet", ["diffusers"]),
        ("unet", ["diffusers", "UNet2DConditionModel", "more"]),
        ("unet", ["diffusers", "AutoModel"]),
        ("unet", ["diffusers", "StableDiffusionPipeline"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("text_encoder", ["stable_diffusion_planted", "Planted"]),
        ("../planted", ["diffusers", "UNet2DConditionModel"]),
        ("_class_name", ["planted", "Planted"]),
        ("_class_name", "../planted"),
        ("_class_name", "ModularPipeline"),
        ("_class_name", "AutoPipelineForText2Image"),
        ("_class_name", None),
    ],
)
def test_a_diffusers_folder_is_made_of_known_classes(diffusion, plant, tmp_path, name, value):
    for file in (diffusion / "planted.py", tmp_path / "planted.py"):
        plant(file)
    amend(diffusion / "model_index.json", **{name: value})
    refused(diffusion, f"model_index.json: {name} is ")


@pytest.mark.parametrize(
    "file", ["unet/diffusers.py", "unet/planted.py", "text_encoder/transformers.py", "None.py", "pipeline.py"]
)
def test_no_module_lies_where_diffusers_looks_for_one(diffusion, plant, file):
    plant(diffusion / file)
    refused(diffusion, f"brings Python code of its own .{file}")


def test_parts_of_a_diffusers_folder_are_looked_at_like_a_model(diffusion):
    amend(diffusion / "text_encoder" / "config.json", attn_implementation="evil/kernel")
    refused(diffusion, "asks for the kernel")
    amend(diffusion / "text_encoder" / "config.json", attn_implementation=None)
    amend(
        diffusion / "unet" / "diffusion_pytorch_model.safetensors.index.json",
        weight_map={"a": "../../a.safetensors"},
    )
    refused(diffusion, "expected .safetensors files beside it")


@pytest.mark.parametrize("content", ["[]", "{", "3", "[" * 100_000])
def test_an_index_that_is_none_is_a_sentence(diffusion, content):
    (diffusion / "model_index.json").write_text(content)
    refused(diffusion, "model_index.json .*Copy the model again")


def test_what_real_folders_say_is_let_through(diffusion, plant):
    """Parts that are not there, a safety checker of the pipeline's own, settings, and a script at the top."""
    plant(diffusion / "handler.py")
    amend(
        diffusion / "model_index.json", safety_checker=[None, None], requires_safety_checker=False, _name_or_path="a/b",
        image_size=None,
    )  # fmt: skip
    amend(diffusion / "text_encoder" / "config.json", auto_map={"AutoModel": "planted.Planted"})
    amend(
        diffusion / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["planted.Planted", None]},
    )
    load_diffusion(diffusion)
