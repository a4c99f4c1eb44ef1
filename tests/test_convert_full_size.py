"""The published sizes, as shapes without memory: every tensor finds its place, and what it all weighs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM

from tests import published_files as files
from trainer.convert.memory import memory_plans, stable_diffusion_2_1
from trainer.convert.minigpt4 import SeeingLLM, Sizes, convert_parts
from trainer.convert.minigpt5 import Heads, convert_tensors

pytestmark = pytest.mark.slow


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def seeing() -> SeeingLLM:
    full = files.FULL
    parts = (files.llama, files.vit, files.qformer, files.projection)
    return convert_parts(
        files.llama_config(full), full.vocabulary, *(files.empty(part(full)) for part in parts), Sizes()
    )


@pytest.fixture(scope="module")
def vicuna(seeing) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM(seeing.config)
    model.load_state_dict(seeing.llm, strict=True, assign=True)
    return model


def test_vicuna_gets_nine_rows(vicuna):
    assert vicuna.get_input_embeddings().weight.shape == (32009, 4096)
    assert numbers(vicuna) == 6_738_415_616 + 2 * 9 * 4096


def test_the_vision_path_is_evas_39_blocks_and_a_q_former_of_12(seeing):
    config = seeing.vision_config
    assert (config.size, config.patch, config.vision_layers, config.vision_width) == (224, 14, 39, 1408)
    assert (config.queries, config.layers, config.cross_every, config.width) == (32, 12, 2, 768)
    vit = sum(tensor.numel() for name, tensor in seeing.vision.items() if name.startswith("vision_model."))
    assert round(vit / 1e6) == 986
    assert sum(name.startswith("vit: blocks.39.") for name in seeing.report.left_over) == 13


def test_all_131_and_254_tensors_of_the_checkpoints_find_their_place(vicuna):
    first, second = files.empty(files.stage1(files.FULL)), files.empty(files.stage2(files.FULL))
    assert (len(first), len(second)) == (131, 254)
    alone, both = convert_tensors(first, None, Heads()), convert_tensors(first, second, Heads())
    assert len(alone.report.used) == 131 and not alone.report.left_over
    assert len(both.report.used) == 254 + 5 and len(both.report.left_over) == 131 - 5
    assert numbers(both.mapper) == 117_575_680 + 5_244_928 + 78_848
    lora = sum(tensor.numel() for name, tensor in both.adapter.items() if ".lora_" in name)
    assert lora == 4_194_304
    assert both.voken_ids == list(range(32000, 32008))
    config = LoraConfig(**{key: value for key, value in both.adapter_config.items() if key != "peft_version"})
    expected = get_peft_model_state_dict(get_peft_model(vicuna, config), save_embedding_layers=False)
    assert {name: tensor.shape for name, tensor in both.adapter.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_the_memory_plan_is_that_of_the_shapes(seeing):
    half, four = memory_plans(seeing.config, seeing.vision_config)
    # 2 bytes for each number of Vicuna-7B, and 32 layers' keys and values of 2048 tokens
    assert half.writing == 2 * (6_738_415_616 + 2 * 9 * 4096) + 2 * 2 * 32 * 4096 * 2048
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert half.writing - four.writing == pytest.approx((2 - 0.5625) * linear)
    assert half.staged == half.writing
    assert half.resident == half.seeing + half.writing + half.drawing
    with torch.device("meta"):
        unet, vae = stable_diffusion_2_1()
    assert (numbers(unet), numbers(vae)) == (865_910_724, 83_653_863)
    print(half, four, sep="\n")
