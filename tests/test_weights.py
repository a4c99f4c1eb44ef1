import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minigpt5_core.conditioning import Space
from minigpt5_core.conditioning.mapper import Mapper, build_mapper
from minigpt5_core.conditioning.mapper_file import KEYS, MapperHeader, load_mapper, save_mapper
from minigpt5_core.config import MapperConfig
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.tensor_files import HASH, atomic_save

SPACE = Space("toy", tokens=5, width=12)
HEADER = MapperHeader(SPACE, "toy-llm", 16, "abc", {"stage": "align", "steps": 3, "seed": 0})


@pytest.fixture
def mapper() -> Mapper:
    torch.manual_seed(0)
    sizes = {"tokens": 5, "width": 12, "hidden": 8, "heads": 2, "layers": 1, "feed_forward": 16}
    return build_mapper(MapperConfig(kind="compact", vokens=3, llm_width=16, **sizes)).eval()


@pytest.fixture
def saved(mapper: Mapper, tmp_path: Path) -> Path:
    save_mapper(tmp_path / "mapper.safetensors", mapper, HEADER)
    return tmp_path / "mapper.safetensors"


def change_header(path: Path, changes: dict[str, str | None]) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


def test_a_saved_mapper_comes_back_with_the_same_weights_and_header(mapper, saved):
    loaded, header = load_mapper(saved)
    assert header == HEADER
    assert loaded.config == mapper.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in mapper.state_dict().items())


def test_a_loaded_mapper_is_in_eval_mode_and_can_be_trained_on(saved):
    loaded, _ = load_mapper(saved)
    assert not loaded.training
    loaded(torch.randn(1, 3, 16)).tokens.sum().backward()
    assert all(weight.grad is not None for weight in loaded.parameters())


def test_a_half_precision_file_is_widened_to_float32(mapper, tmp_path):
    save_mapper(tmp_path / "half.safetensors", mapper.half(), HEADER)
    loaded, _ = load_mapper(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def test_saving_again_gives_the_same_bytes_and_leaves_no_other_file(mapper, saved):
    first = saved.read_bytes()
    for _ in range(4):
        save_mapper(saved, mapper, HEADER)
        assert saved.read_bytes() == first
    assert list(saved.parent.iterdir()) == [saved]


def test_the_header_has_exactly_the_promised_keys(saved):
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"format", HASH, *KEYS}
    assert json.loads(metadata["minigpt5.llm"]) == {"id": "toy-llm", "width": 16, "hash": "abc"}
    assert metadata["minigpt5.vokens"] == "3"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(saved):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        atomic_save({"weight": torch.zeros(1)}, saved, {"number": 1})  # type: ignore[dict-item]
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("length", [0, 4, 200, -8])
def test_a_truncated_file_is_bad_input(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[: length if length >= 0 else len(content) + length])
    with pytest.raises(BadInputError, match="not a whole safetensors file"):
        load_mapper(saved)


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        load_mapper(tmp_path / "nothing.safetensors")


def test_a_folder_is_bad_input(tmp_path):
    with pytest.raises(BadInputError):
        load_mapper(tmp_path)


def test_a_safetensors_file_without_a_header_is_bad_input(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(BadInputError, match="not a mapper: its header lacks minigpt5.format_version"):
        load_mapper(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("minigpt5.colour", "red", "unknown header key minigpt5.colour. Known keys: minigpt5.format_version"),
        ("minigpt5.format_version", "2", "format version 2, this code reads 1"),
        ("minigpt5.vokens", "4", "minigpt5.vokens is 4, minigpt5.mapper says 3"),
        ("minigpt5.vokens", None, "lacks minigpt5.vokens"),
        ("minigpt5.space", "{", "minigpt5.space is not JSON"),
        ("minigpt5.space", '"sd15"', "expected an object"),
        ("minigpt5.space", '{"name": "x", "tokens": 5, "width": 13}', "width is 12, its header says 13"),
        ("minigpt5.llm", '{"id": "x", "width": 16}', "minigpt5.llm: missing key 'hash'"),
        ("minigpt5.llm", '{"id": "x", "width": 17, "hash": ""}', "LLM width is 16, its header says 17"),
    ],
)
def test_a_header_that_is_not_understood_is_bad_input(saved, key, value, message):
    change_header(saved, {key: value})
    with pytest.raises(BadInputError, match=message):
        load_mapper(saved)


def test_an_unknown_kind_in_the_header_lists_the_known_ones(mapper, saved):
    values = mapper.config.to_dict() | {"kind": "huge"}
    change_header(saved, {"minigpt5.mapper": json.dumps(values)})
    with pytest.raises(BadInputError, match="Known kinds: compact, connector, reference"):
        load_mapper(saved)


def test_an_unknown_key_in_the_config_lists_the_valid_ones(mapper, saved):
    change_header(saved, {"minigpt5.mapper": json.dumps(mapper.config.to_dict() | {"depth": 1})})
    with pytest.raises(BadInputError, match="unknown key 'depth'. Valid keys: "):
        load_mapper(saved)


def test_a_tensor_too_many_too_few_or_of_another_shape_is_bad_input(mapper, saved):
    with safe_open(saved, framework="pt") as opened:
        metadata = {name: value for name, value in opened.metadata().items() if name != HASH}
    for change in ({"extra": torch.zeros(1)}, {"queries": torch.zeros(1, 4, 8)}, {"queries": None}):
        tensors = mapper.state_dict() | change
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, saved, metadata)
        with pytest.raises(BadInputError, match=f"tensors do not fit .*: 1 differ; {next(iter(change))} is "):
            load_mapper(saved)


def test_saving_under_a_header_of_another_space_or_llm_is_refused(mapper, tmp_path):
    for wrong in ({"space": Space("sd15", 77, 768)}, {"llm_width": 17}):
        with pytest.raises(BadInputError, match="its header says"):
            save_mapper(tmp_path / "mapper.safetensors", mapper, dataclasses.replace(HEADER, **wrong))


def write_llm(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> str:
    folder.mkdir()
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard}.safetensors")
    return hash_weights(folder)


def test_the_hash_of_an_llm_does_not_depend_on_how_its_folder_is_split(tmp_path):
    tensors = {"a": torch.randn(30, 4), "b": torch.randn(7).bfloat16(), "c": torch.tensor(1.0)}
    assert write_llm(tmp_path / "one", tensors) == write_llm(tmp_path / "three", tensors, shards=3)


def test_the_hash_of_an_llm_sees_a_changed_value_name_and_dtype(tmp_path):
    weight = torch.randn(30, 4)
    changed = weight.clone()
    changed[-1, -1] += 1e-3
    folders = [{"a": weight}, {"a": changed}, {"b": weight}, {"a": weight.bfloat16()}]
    hashes = {write_llm(tmp_path / str(number), tensors) for number, tensors in enumerate(folders)}
    assert len(hashes) == 4


def test_a_folder_without_weights_cannot_be_hashed(tmp_path):
    with pytest.raises(BadInputError, match="holds no .safetensors"):
        hash_weights(tmp_path)
