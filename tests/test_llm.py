"""Folders an LLM and its adapter come from: whole ones are loaded, all others are refused by name."""

import json
import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, add_vokens, load_adapter, load_llm
from minigpt5_core.llm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from minigpt5_core.llm.unmerged_lora import UnmergedLora
from minigpt5_core.vision import ImageEncoder, ImageEncoderConfig


def tokens_config(llm: FrozenLLM) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=llm.voken_ids, target_modules=["embed_tokens"])


def lora_config(llm: FrozenLLM) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=llm.voken_ids)


def save_adapter(llm_folder: Path, folder: Path, config=tokens_config, vokens: int = 8) -> Path:
    """An adapter as the trainer writes it, with weights that are all 0.5."""
    llm = load_llm(llm_folder, vokens)
    adapted = get_peft_model(llm.causal_lm, config(llm))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.5)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_an_llm_file_cut_short_is_named(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    cut_short(folder / "model.safetensors")
    with pytest.raises(BadInputError, match="llm/model.safetensors.*cut short"):
        load_llm(folder)


def test_a_broken_configuration_is_bad_input(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="The LLM in .*llm cannot be read"):
        load_llm(folder)


def test_pickled_llm_weights_are_never_read(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"no \.safetensors weights, and pickled"):
        load_llm(folder)


@pytest.mark.parametrize("config", [tokens_config, lora_config])
def test_an_adapter_of_the_trainer_is_merged(tiny_llm_folder, tmp_path, config):
    adapter = save_adapter(tiny_llm_folder, tmp_path, config)
    llm = load_adapter(load_llm(tiny_llm_folder), adapter)
    assert torch.equal(llm.embed(torch.tensor(llm.voken_ids)), torch.full((8, 32), 0.5))
    assert type(llm.causal_lm) is LlamaForCausalLM


@pytest.mark.parametrize("config", [tokens_config, lora_config])
def test_a_merged_adapter_gives_what_peft_gives(tiny_llm_folder, tmp_path, config):
    adapter = save_adapter(tiny_llm_folder, tmp_path, config)
    ours = load_adapter(load_llm(tiny_llm_folder), adapter)
    plain = load_llm(tiny_llm_folder)
    peft = PeftModel.from_pretrained(plain.causal_lm, str(adapter)).eval()
    ids = torch.tensor([[5, 6, *ours.voken_ids]])
    assert torch.allclose(ours.causal_lm(ids).logits, peft(ids).logits, atol=1e-4)
    assert not torch.allclose(ours.causal_lm(ids).logits, load_llm(tiny_llm_folder).causal_lm(ids).logits)


def test_a_kind_of_lora_that_is_not_read_is_refused_by_name(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lora_config)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text()) | {"use_dora": True}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="use_dora"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_a_missing_adapter_file_is_named_and_a_pickle_beside_it_is_not_read(tiny_llm_folder, tmp_path, name):
    adapter = save_adapter(tiny_llm_folder, tmp_path)
    (adapter / name).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(BadInputError, match=f"it has no {name}"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


def test_an_adapter_file_cut_short_is_named(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path)
    cut_short(adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match=f"{ADAPTER_WEIGHTS}.*cut short"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


@pytest.mark.parametrize("content", ["{", "{}", '{"peft_type": "NONE_SUCH"}'])
def test_a_broken_adapter_configuration_is_bad_input(tiny_llm_folder, tmp_path, content):
    adapter = save_adapter(tiny_llm_folder, tmp_path)
    (adapter / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(BadInputError, match="The adapter in"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


@pytest.mark.parametrize("config", [tokens_config, lora_config])
def test_an_adapter_for_other_voken_rows_is_refused(tiny_llm_folder, tmp_path, config):
    adapter = save_adapter(tiny_llm_folder, tmp_path, config, vokens=4)
    with pytest.raises(
        BadInputError,
        match=r"\(4\), but the vokens of this LLM of width 32 .*\(8\).*Give the LLM it was trained for",
    ):
        load_adapter(load_llm(tiny_llm_folder), adapter)


def test_an_adapter_without_voken_rows_is_refused(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lambda _: LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        BadInputError, match="trains no vokens.*LoRA for text alone.*merge it into the LLM with PEFT"
    ):
        load_adapter(load_llm(tiny_llm_folder), adapter)


@pytest.mark.parametrize("targets", [r".*self_attn\.(q|v)_proj", "all-linear", r"(a+)+$"])
def test_an_adapters_targets_may_be_a_pattern_which_is_never_run(tiny_llm_folder, tmp_path, targets):
    """What PEFT was told by a pattern is read off the file; one that takes forever is none to be tried."""

    def config(llm: FrozenLLM) -> LoraConfig:
        real = targets if "a+" not in targets else r".*self_attn\.(q|v)_proj"
        return LoraConfig(r=2, target_modules=real, trainable_token_indices=llm.voken_ids)

    adapter = save_adapter(tiny_llm_folder, tmp_path, config)
    values = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(values | {"target_modules": targets}))
    ours = load_adapter(load_llm(tiny_llm_folder), adapter)
    plain, ids = load_llm(tiny_llm_folder), torch.tensor([[5, 6, *ours.voken_ids]])
    if "a+" not in targets:
        peft = PeftModel.from_pretrained(plain.causal_lm, str(adapter)).eval()
        assert torch.allclose(ours.causal_lm(ids).logits, peft(ids).logits, atol=1e-4)
    else:
        assert not torch.allclose(ours.causal_lm(ids).logits, plain.causal_lm(ids).logits)


@pytest.mark.parametrize("targets", [["q_proj"], r".*q_proj"])
def test_a_foreign_lora_without_voken_rows_is_refused_however_its_targets_are_named(
    tiny_llm_folder, tmp_path, targets
):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lambda _: LoraConfig(r=2, target_modules=targets))
    with pytest.raises(BadInputError, match="trains no vokens") as refused:
        load_adapter(load_llm(tiny_llm_folder), adapter)
    assert "Set vokens to" not in str(refused.value)


def test_an_adapter_for_another_width_is_refused(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path)
    tokenizer = load_llm(tiny_llm_folder).tokenizer
    config = json.loads((tiny_llm_folder / "config.json").read_text()) | {"hidden_size": 64, "head_dim": 16}
    wide = add_vokens(tokenizer, LlamaForCausalLM(LlamaConfig(**config)), 8)
    with pytest.raises(
        BadInputError, match="does not fit an LLM of width 64.*Give the LLM it was trained for"
    ):
        load_adapter(wide, adapter)


def test_a_tensor_the_adapter_lacks_is_named(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lora_config)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    lost = next(name for name in sorted(weights) if "lora_B" in name)
    del weights[lost]
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(
        BadInputError,
        match=f"width 32: 1 tensors differ; the file lacks {lost}.*Give the LLM it was trained for",
    ):
        load_adapter(load_llm(tiny_llm_folder), adapter)


def test_voken_rows_the_adapter_lacks_are_named(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lora_config)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    kept = {name: weight for name, weight in weights.items() if "trainable_tokens" not in name}
    save_file(kept, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match="the file lacks .*trainable_tokens_delta"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


def test_a_tensor_the_llm_has_no_place_for_is_named(tiny_llm_folder, tmp_path):
    adapter = save_adapter(tiny_llm_folder, tmp_path, lora_config)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    deeper = {name.replace("layers.1", "layers.7"): weight.clone() for name, weight in weights.items()}
    save_file(weights | deeper, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match="2 tensors differ; the LLM has no place for .*layers.7"):
        load_adapter(load_llm(tiny_llm_folder), adapter)


def test_what_is_laid_on_the_llm_leaves_the_one_given_as_it_was(tiny_llm):
    """It shares tokenizer and causal LM, and whatever else is not replaced."""
    with pytest.raises(FrozenInstanceError):
        tiny_llm.bos_id = 1
    adapter = Adapter(tiny_llm.voken_ids, {}, {}, 1.0, bos_id=7)
    unmerged = UnmergedLora({}, 1.0)
    adapted = tiny_llm.with_adapter(adapter, unmerged)
    assert (adapted.bos_id, adapted.unmerged_lora) == (7, (unmerged,))
    assert (tiny_llm.bos_id, tiny_llm.unmerged_lora) == (None, ())
    assert adapted.causal_lm is tiny_llm.causal_lm and adapted.tokenizer is tiny_llm.tokenizer


def test_another_image_encoder_begins_with_no_picture_seen(tiny_llm):
    config = ImageEncoderConfig(
        llm_width=32, size=16, tokens=3, channels=[4, 8], hidden=12, heads=2, layers=1
    )
    first, second = (tiny_llm.with_vision(ImageEncoder(config).eval()) for _ in range(2))
    picture = torch.rand(16, 16, 3)
    assert not torch.equal(first.see(picture), second.see(picture))
    assert len(first.seen) == len(second.seen) == 1 and not tiny_llm.has_vision
