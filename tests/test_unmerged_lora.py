"""An LLM in 4 bits: what it computes is computed from its dequantised weights by hand, adapters included."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling, generate
from minigpt5_core.llm import load_adapter, load_llm, precision
from minigpt5_core.llm.adapter import ADAPTER_WEIGHTS, VOKEN_IDS, read_adapter, split_quantized_lora
from minigpt5_core.llm.precision import PRECISIONS, dtype_and_quantization
from minigpt5_core.story.prompts import Turn, fit_prompt

bitsandbytes = pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 6, 70, 80, 90, 33, 200]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_folder(folder, tokenizer, tied=True):
    """A LLaMA 64 wide with a Hugging Face folder."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    for part in (tokenizer, LlamaForCausalLM(config)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "tied", tiny_tokenizer(["<|im_start|>"]))


@pytest.fixture(scope="module")
def untied(tiny_tokenizer, tmp_path_factory):
    return make_folder(
        tmp_path_factory.mktemp("llm") / "untied", tiny_tokenizer(["<|im_start|>"]), tied=False
    )


def in_4_bits(folder):
    """NF4 as in use, but computing in float32, so that numbers can be compared."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return load_llm(folder, quantization=config)


def unpacked(llm):
    """The same LLM with plain matrices, each what its NF4 blocks stand for; to be taken before the LLM was run."""
    plain = LlamaForCausalLM(llm.causal_lm.config)
    weights = dict(llm.causal_lm.named_parameters())
    for name, parameter in plain.named_parameters():
        weight = weights[name]
        if weight.dtype == torch.uint8:
            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        parameter.data = weight.detach().float().clone()
    return replace(llm, causal_lm=plain.eval(), unmerged_lora=())


def save_adapter(llm_folder, folder, **changes):
    """As PEFT saves it, with random weights; its rank is 4 and its scale 1.5."""
    llm = load_llm(llm_folder)
    settings = {"target_modules": TARGETS, "trainable_token_indices": llm.voken_ids} | changes
    adapted = get_peft_model(llm.causal_lm, LoraConfig(r=4, lora_alpha=6, **settings))
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def by_hand(llm, adapter, strength=1.0):
    """`unpacked` with every B A added to its matrix."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    plain = unpacked(llm)
    for name, module in plain.causal_lm.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            module.weight.data += strength * 1.5 * up @ down
    rows = next(tensor for name, tensor in tensors.items() if name.endswith("trainable_tokens_delta"))
    plain.causal_lm.get_input_embeddings().weight.data[llm.voken_ids] = rows
    return plain


@torch.no_grad()
def logits(llm, ids=IDS):
    return llm.logits(llm.read(llm.embed(ids)).last_hidden_state)


def test_all_layers_but_embedding_and_head_are_packed(folder, untied):
    for place in (folder, untied):
        llm = load_llm(place, **dtype_and_quantization("4bit")).causal_lm
        linear = {name for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
        packed = {name for name, weight in llm.named_parameters() if weight.dtype == torch.uint8}
        assert packed == {f"{name}.weight" for name in linear - {"lm_head"}} and len(packed) == 14
        assert llm.lm_head.weight.dtype == llm.model.embed_tokens.weight.dtype == torch.bfloat16
        assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == (place is folder)


def test_it_computes_with_what_its_blocks_stand_for(folder):
    llm = in_4_bits(folder)
    plain = unpacked(llm)
    assert torch.allclose(logits(llm), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(llm), logits(load_llm(folder)), atol=0.1)  # 4 bits are not 32


def test_reading_its_weights_changes_nothing(folder):
    llm = load_llm(folder, **dtype_and_quantization("4bit"))
    before = logits(llm)
    llm.causal_lm.state_dict()
    assert torch.equal(logits(llm), before)


def test_unmerged_lora_is_lora_added_to_its_matrices(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    expected = by_hand(in_4_bits(folder), adapter)
    llm = load_adapter(in_4_bits(folder), adapter)
    ids = torch.tensor([[*IDS[0], *llm.voken_ids]])
    assert torch.allclose(logits(llm, ids), logits(expected, ids), atol=1e-3)
    assert (logits(llm, ids) - logits(in_4_bits(folder), ids)).abs().max() > 1
    assert len(llm.unmerged_lora[0].names) == 6


def test_it_gives_what_peft_gives(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    llm = load_adapter(in_4_bits(folder), adapter)
    peft = PeftModel.from_pretrained(in_4_bits(folder).causal_lm, str(adapter)).eval()
    with torch.no_grad():
        assert torch.allclose(logits(llm), peft(IDS).logits, atol=1e-3)


def test_two_adapters_add_up(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    llm = load_adapter(load_adapter(in_4_bits(folder), adapter), adapter)
    assert torch.allclose(logits(llm), logits(by_hand(in_4_bits(folder), adapter, 2.0)), atol=2e-3)


def test_strength_weakens_it(folder, tmp_path):
    path = save_adapter(folder, tmp_path)
    expected = by_hand(in_4_bits(folder), path, 0.5)
    llm = in_4_bits(folder)
    adapter = read_adapter(path, llm.causal_lm, llm.voken_ids)
    rest, unmerged = split_quantized_lora(llm.causal_lm, adapter, 0.5)
    assert not rest.lora and rest.rows.keys() == adapter.rows.keys()
    without_vokens = slice(0, llm.voken_ids[0])
    found = logits(llm.with_adapter(rest, unmerged))[..., without_vokens]
    assert torch.allclose(found, logits(expected)[..., without_vokens], atol=1e-3)


def test_nothing_stays_behind(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    llm = in_4_bits(folder)
    before = logits(llm)
    _, unmerged = split_quantized_lora(llm.causal_lm, read_adapter(adapter, llm.causal_lm, llm.voken_ids))
    adapted = llm.with_adapter(read_adapter(adapter, llm.causal_lm, llm.voken_ids), unmerged)
    assert not torch.allclose(logits(adapted), before, atol=0.1)
    with pytest.raises(RuntimeError):
        adapted.read(torch.zeros(1, 2, 3))  # of another width: it ends in the midst
    assert torch.equal(logits(llm), before)
    assert not any(module._forward_hooks for module in llm.causal_lm.modules())


def test_voken_rows_move_no_other_logit(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path, target_modules="dummy-target-modules")
    llm = load_adapter(in_4_bits(folder), adapter)
    before, after = logits(in_4_bits(folder)), logits(llm)
    assert torch.equal(before[..., : llm.voken_ids[0]], after[..., : llm.voken_ids[0]])
    assert (before[..., llm.voken_ids] != after[..., llm.voken_ids]).all()


def test_an_embedding_and_a_head_that_were_trained_whole_replace_its_own(untied, tmp_path):
    """As in the adapters of converted published checkpoints."""
    changes = {"trainable_token_indices": None, "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = save_adapter(untied, tmp_path, **changes)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    ids = in_4_bits(untied).voken_ids
    save_file(tensors, adapter / ADAPTER_WEIGHTS, {"format": "pt", VOKEN_IDS: str(ids)})
    llm = load_adapter(in_4_bits(untied), adapter)
    embedding, head = (
        tensors[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")
    )
    assert torch.equal(llm.causal_lm.model.embed_tokens.weight, embedding)
    assert torch.equal(llm.causal_lm.lm_head.weight, head)
    peft = PeftModel.from_pretrained(in_4_bits(untied).causal_lm, str(adapter)).eval()
    with torch.no_grad():
        assert torch.allclose(logits(llm), peft(IDS).logits, rtol=1e-3, atol=1e-3)


def test_weights_in_plain_numbers_leave_no_lora_unmerged(folder, tmp_path):
    for held in ("float32", "bf16"):
        llm = load_adapter(load_llm(folder, **dtype_and_quantization(held)), save_adapter(folder, tmp_path))
        assert llm.unmerged_lora == ()


def test_a_story_is_told_as_by_the_matrices(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    told = []
    for llm in (by_hand(in_4_bits(folder), adapter), load_adapter(in_4_bits(folder), adapter)):
        prompt = fit_prompt(llm, [Turn("Mia.")], 20).prompt
        told.append(generate(llm, [prompt], Sampling(max_new_tokens=8), [3])[0])
    assert told[0].ids == told[1].ids
    assert torch.allclose(told[0].voken_states, told[1].voken_states, atol=1e-3)


def test_as_it_is_used_it_computes_in_bf16(folder, tmp_path):
    llm = load_llm(folder, **dtype_and_quantization("4bit"))
    expected = logits(by_hand(llm, save_adapter(folder, tmp_path)))
    found = logits(load_adapter(llm, tmp_path))
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() / expected.norm() < 0.03


def test_what_is_no_precision_and_what_is_not_installed_is_named(monkeypatch):
    assert [dtype_and_quantization(name)["dtype"] for name in PRECISIONS] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    with pytest.raises(BadInputError, match="'8bit'; expected one of float32, bf16, 4bit"):
        dtype_and_quantization("8bit")
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(
        BadInputError, match="bitsandbytes, which is not installed. .* -m pip install bitsandbytes"
    ):
        dtype_and_quantization("4bit")
