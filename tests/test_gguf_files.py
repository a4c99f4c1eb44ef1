"""Toy LLMs in real GGUF files: what is read is what was written, and a file that cannot be read is named."""

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling, generate
from minigpt5_core.llm import gguf_files, load_llm
from minigpt5_core.llm.files import default_llm, find_gguf
from minigpt5_core.llm.precision import dtype_and_quantization
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.story.prompts import Turn, chat_text, fit_prompt
from minigpt5_core.versions import has_transformers

pytestmark = pytest.mark.skipif(
    not has_transformers(gguf_files.OLDEST), reason="GGUF files need a newer transformers"
)

IDS = torch.arange(40)[None]


def write_gguf(file: Path, folder: Path, kind: str = "F32", arch: str = "llama", left_out: str = "") -> Path:
    """The LLaMA of a Hugging Face folder as llama.cpp's converter writes it; matrices are of the `kind`."""
    model = LlamaForCausalLM.from_pretrained(folder)
    writer = GGUFWriter(file, arch)
    writer.add_name("toy")  # every real file has a name, and older versions of transformers ask for it
    add_sizes(writer, model.config)
    add_tokenizer(writer, PreTrainedTokenizerFast.from_pretrained(folder), model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if theirs == left_out or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if (
            "q_proj" in name or "k_proj" in name
        ):  # rotary pairs lie half a head apart here, side by side there
            weight = weight.unflatten(0, (-1, 2, 4)).transpose(1, 2).reshape(weight.shape)  # heads are 8 wide
        stored = GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(theirs, gguf.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_sizes(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer, tokenizer, rows):
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.get) + [f"[PAD{index}]" for index in range(len(ids), rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    control = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in control else 1 if token in ids else 5 for token in tokens])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def logits(llm):
    with torch.no_grad():
        return llm.logits(llm.read(llm.embed(IDS)).last_hidden_state)


@pytest.fixture(scope="module")
def toy(tiny_llm_folder, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", tiny_llm_folder)


def test_a_file_of_float32_computes_what_the_folder_computes(toy, tiny_llm_folder):
    llm, plain = load_llm(toy), load_llm(tiny_llm_folder)
    assert torch.allclose(logits(llm), logits(plain), atol=1e-5)  # the norm's epsilon is in single precision
    assert (llm.width, llm.context, llm.voken_ids) == (plain.width, plain.context, plain.voken_ids)
    assert not any(weight.requires_grad for weight in llm.causal_lm.parameters())


def test_a_head_of_its_own_is_read(untied_llm_folder, tmp_path):
    file = write_gguf(tmp_path / "untied.gguf", untied_llm_folder)
    assert torch.allclose(logits(load_llm(file)), logits(load_llm(untied_llm_folder)), atol=1e-5)


def test_a_file_of_float16_is_the_folder_rounded(tiny_llm_folder, tmp_path):
    llm, plain = (
        load_llm(write_gguf(tmp_path / "half.gguf", tiny_llm_folder, "F16")),
        load_llm(tiny_llm_folder),
    )
    for name, weight in plain.causal_lm.model.layers.state_dict().items():
        rounded = weight.half().float() if weight.ndim > 1 else weight
        assert torch.equal(llm.causal_lm.model.layers.state_dict()[name], rounded)
    assert torch.allclose(logits(llm), logits(plain), atol=0.02)


def test_a_quantised_file_is_the_folder_within_half_a_step(tiny_llm_folder, tmp_path):
    llm, plain = (
        load_llm(write_gguf(tmp_path / "q8.gguf", tiny_llm_folder, "Q8_0")),
        load_llm(tiny_llm_folder),
    )
    matrices = {
        name: weight for name, weight in plain.causal_lm.model.layers.named_parameters() if weight.ndim > 1
    }
    for name, weight in matrices.items():
        blocks = weight.unflatten(-1, (-1, 32))  # each with a scale of its own, in half precision
        step = blocks.abs().amax(-1, keepdim=True) / 127
        found = llm.causal_lm.model.layers.get_parameter(name).unflatten(-1, (-1, 32))
        error = ((found - blocks) / step).abs().max()
        assert 0.3 < error < 0.6, name  # 0.5 and the scale's own rounding
    assert torch.allclose(logits(llm), logits(plain), atol=0.5)
    assert not torch.equal(logits(llm), logits(plain))


def test_its_tokenizer_is_the_files(toy, tiny_llm_folder):
    llm, plain = load_llm(toy), load_llm(tiny_llm_folder)
    text = "<|im_start|>Mia  the fox, é 🦊!<|im_end|>\n"
    assert llm.encode(text) == plain.encode(text)
    assert llm.tokenizer.chat_template == plain.tokenizer.chat_template
    assert llm.tokenizer.eos_token_id == plain.tokenizer.eos_token_id


def test_rows_that_only_fill_up_are_no_tokens(tiny_llm_folder, tmp_path):
    """As llama.cpp's converter names rows that no token of the folder's tokenizer has."""
    plain = load_llm(tiny_llm_folder)
    model = LlamaForCausalLM.from_pretrained(tiny_llm_folder)
    model.resize_token_embeddings(288)
    model.save_pretrained(tmp_path / "wide")
    PreTrainedTokenizerFast.from_pretrained(tiny_llm_folder).save_pretrained(tmp_path / "wide")
    llm = load_llm(write_gguf(tmp_path / "wide.gguf", tmp_path / "wide"))
    assert llm.voken_ids == load_llm(tmp_path / "wide").voken_ids == plain.voken_ids
    assert llm.causal_lm.get_input_embeddings().num_embeddings == 288


def test_a_tokenizer_beside_the_file_is_preferred(toy, tiny_tokenizer, tmp_path):
    file = Path(shutil.copy(toy, tmp_path))
    other = tiny_tokenizer(["<|im_start|>", "<|mine|>"])
    other.save_pretrained(tmp_path)
    assert load_llm(file).encode("<|mine|>") == [other.convert_tokens_to_ids("<|mine|>")]


def test_a_story_is_told_as_from_the_folder(toy, tiny_llm_folder):
    told = []
    for place in (toy, tiny_llm_folder):
        llm = load_llm(place)
        prompt = fit_prompt(llm, [Turn("Mia.")], 20).prompt
        told.append(generate(llm, [prompt], Sampling(max_new_tokens=6), [3])[0])
    assert told[0].text == told[1].text
    assert torch.allclose(told[0].voken_states, told[1].voken_states, atol=1e-4)


def test_a_folder_with_a_single_file_is_that_file(toy, tmp_path):
    Path(shutil.copy(toy, tmp_path))
    assert torch.equal(logits(load_llm(tmp_path)), logits(load_llm(toy)))
    assert hash_weights(tmp_path) == hash_weights(toy)
    shutil.copy(toy, tmp_path / "second.gguf")
    with pytest.raises(BadInputError, match="no config.json.*or a .gguf file"):
        load_llm(tmp_path)


def test_safetensors_in_a_folder_come_first(toy, tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "both"))
    plain = hash_weights(folder)
    shutil.copy(toy, folder)
    assert hash_weights(folder) == plain != hash_weights(toy)


def test_the_hash_is_that_of_the_bytes(toy, tmp_path):
    copied = Path(shutil.copy(toy, tmp_path / "other name.gguf"))
    assert hash_weights(copied) == hash_weights(toy)
    content = bytearray(toy.read_bytes())
    content[-1] ^= 1  # a bit of the last weight
    copied.write_bytes(content)
    assert hash_weights(copied) != hash_weights(toy)


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])  # within the metadata, within the weights, near their end
def test_a_file_cut_short_is_named(toy, tmp_path, kept):
    file, content = tmp_path / "cut.gguf", toy.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(BadInputError, match="cut.gguf is not a whole gguf file. It may be cut short"):
        load_llm(file)


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "letter.gguf").write_text("Dear Mia")
    with pytest.raises(BadInputError, match="letter.gguf is no GGUF file .it begins with b'Dear'"):
        load_llm(tmp_path / "letter.gguf")
    for ask in (load_llm, hash_weights):
        with pytest.raises(BadInputError, match="There is no file .*gone.gguf"):
            ask(tmp_path / "gone.gguf")


def test_an_architecture_that_cannot_be_read_is_named(tiny_llm_folder, tmp_path):
    file = write_gguf(tmp_path / "odd.gguf", tiny_llm_folder, arch="clip")
    with pytest.raises(
        BadInputError, match="odd.gguf cannot be read: .*architecture clip .*Give the same model as"
    ):
        load_llm(file)


def test_a_model_that_tells_nothing_is_refused(tiny_llm_folder, tmp_path):
    file = write_gguf(tmp_path / "t5.gguf", tiny_llm_folder, arch="t5")
    with pytest.raises(BadInputError, match="t5.gguf holds a model of the kind 't5'"):
        load_llm(file)


def test_a_part_of_a_model_is_refused(tiny_llm_folder, tmp_path):
    file = write_gguf(tmp_path / "part.gguf", tiny_llm_folder, left_out="blk.1.ffn_up.weight")
    with pytest.raises(
        BadInputError, match="lacks 1 of the model's tensors, model.layers.1.mlp.up_proj.weight"
    ):
        load_llm(file)


def test_the_missing_package_is_named(toy, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(
        BadInputError, match="package gguf, .*is not installed. Install it: .* -m pip install gguf"
    ):
        load_llm(toy)


def test_4_bits_of_a_gguf_file_are_refused(toy):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(BadInputError, match="toy.gguf is a GGUF file, .* cannot be held in 4 bits"):
        load_llm(toy, **dtype_and_quantization("4bit"))


@pytest.mark.slow
def test_the_default_llms_own_file_is_what_its_folder_holds_rounded_to_half():
    llm, plain = load_llm(find_gguf()), load_llm(default_llm())
    weights, theirs = llm.causal_lm.state_dict(), plain.causal_lm.state_dict()
    assert weights.keys() == theirs.keys()
    trained = {name: weight[:49152] for name, weight in weights.items()}  # the rest are vokens
    assert all(torch.equal(weight.half().float(), theirs[name][:49152]) for name, weight in trained.items())
    assert (llm.voken_ids, llm.context) == (plain.voken_ids, plain.context)
    text = chat_text(llm, [Turn("Mia the fox, 1984.")])
    assert text == chat_text(plain, [Turn("Mia the fox, 1984.")]) and llm.encode(text) == plain.encode(text)
