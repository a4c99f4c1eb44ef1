"""Damaged weights: a flipped byte, a number that is none, a tensor that is missing. None of them loads in silence."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt5_core.conditioning import SPACES
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.conditioning.mapper_file import MapperHeader, load_mapper, save_mapper
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.llm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minigpt5_core.tensor_files import HASH, hash_tensors, is_finite, read_whole
from minigpt5_core.vision.encoder import ImageEncoder, ImageEncoderConfig
from minigpt5_core.vision.image_adapter import ImageAdapterHeader, load_image_adapter, save_image_adapter
from trainer.diffusion import load_text_encoders

pytestmark = pytest.mark.filterwarnings("ignore")
SPACE = SPACES["storybook"]


@pytest.fixture
def mapper_file(tmp_path: Path) -> Path:
    file = tmp_path / "mapper.safetensors"
    save_mapper(file, build_mapper(compact_config(SPACE, 16)), MapperHeader(SPACE, "toy", 16, ""))
    return file


@pytest.fixture
def image_adapter_file(tmp_path: Path) -> Path:
    file = tmp_path / "image_adapter.safetensors"
    save_image_adapter(
        file, ImageEncoder(ImageEncoderConfig(llm_width=16)), ImageAdapterHeader("toy", 16, "")
    )
    return file


def flip(file: Path, rng: random.Random) -> None:
    """One bit of one tensor's bytes."""
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[rng.randrange(begin, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def spoil(file: Path, value: float) -> None:
    """One number of the first tensor becomes `value`, in a file that says nothing of its hash."""
    tensors, metadata = read_whole(file)
    first = min(name for name, tensor in tensors.items() if tensor.numel() and tensor.is_floating_point())
    tensors[first].view(-1)[-1] = value
    save_file(tensors, file, {name: text for name, text in metadata.items() if name != HASH})


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_is_found(mapper_file, image_adapter_file, seed):
    for file, load in ((mapper_file, load_mapper), (image_adapter_file, load_image_adapter)):
        load(file)
        flip(file, random.Random(seed))
        with pytest.raises(BadInputError, match="is damaged"):
            load(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_where_there_is_no_hash(mapper_file, image_adapter_file, value):
    for file, load in ((mapper_file, load_mapper), (image_adapter_file, load_image_adapter)):
        spoil(file, value)
        with pytest.raises(BadInputError, match="holds NaN or infinite numbers"):
            load(file)


def test_a_file_without_a_hash_loads_as_before(mapper_file):
    mapper, header = load_mapper(mapper_file)
    tensors, metadata = read_whole(mapper_file)
    save_file(tensors, mapper_file, {name: text for name, text in metadata.items() if name != HASH})
    again, same = load_mapper(mapper_file)
    assert same == header
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in mapper.state_dict().items())


def test_the_hash_is_of_names_types_shapes_and_bytes():
    plain = {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    assert hash_tensors(plain) == hash_tensors(dict(reversed(plain.items())))
    others = [
        {"a": torch.zeros(3, 2), "b": plain["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": plain["b"]},
        {"c": plain["a"], "b": plain["b"]},
        {"a": -plain["a"], "b": plain["b"]},  # -0.0
    ]
    assert len({hash_tensors(one) for one in [plain, *others]}) == 5


def test_what_is_finite():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
        assert not is_finite(torch.tensor([0, float("nan"), 1], dtype=dtype))
        assert not is_finite(torch.tensor([0, -float("inf")], dtype=dtype))
    assert is_finite(torch.empty(0)) and is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor(1.0))


@pytest.fixture(scope="module")
def adapter(tiny_llm_folder, tmp_path_factory) -> Path:
    """As the trainer writes it."""
    from trainer.llm.adapters import save_adapter
    from trainer.stages.finetune import FinetuneModel, with_lora

    _, adapted = with_lora(load_llm(tiny_llm_folder), FinetuneModel())
    folder = tmp_path_factory.mktemp("damage") / "adapter"
    save_adapter(adapted, tiny_llm_folder, folder)
    return folder


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def test_an_adapter_is_written_with_its_hash_and_a_flipped_bit_is_found(copied, tiny_llm_folder):
    file = copied / ADAPTER_WEIGHTS
    assert read_whole(file)[1][HASH] == hash_tensors(load_file(file))
    load_adapter(load_llm(tiny_llm_folder), copied)
    flip(file, random.Random(1))
    with pytest.raises(BadInputError, match="is damaged"):
        load_adapter(load_llm(tiny_llm_folder), copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers_to_transform": [0]}, "sets layers_to_transform to"),
        ({"use_qalora": True}, "sets use_qalora to True"),
        ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens to"),
        ({"target_parameters": ["x"]}, "sets target_parameters to"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication to"),
        ({"rank_pattern": {"q_proj": 4}}, "sets rank_pattern to"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"of_next_year": 1}, "sets of_next_year to 1"),
        ({"lora_alpha": float("nan")}, "its lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "its lora_alpha is inf"),
        ({"lora_alpha": "16"}, "its lora_alpha is '16'"),
        ({"r": 0}, "its r is 0"),
    ],
)
def test_an_adapters_settings_that_would_change_what_it_does_are_refused(
    copied, tiny_llm_folder, change, said
):
    config = json.loads((copied / ADAPTER_CONFIG).read_text())
    (copied / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(BadInputError, match=said):
        load_adapter(load_llm(tiny_llm_folder), copied)


def without(file: Path, ending: str) -> None:
    """Leaves the tensors of that ending out."""
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})


def test_an_llm_that_lacks_weights_is_refused(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    without(folder / "model.safetensors", "q_proj.weight")
    with pytest.raises(BadInputError, match=r"lacks \d+ of the weights .*q_proj"):
        load_llm(folder)


def test_an_llm_whose_weights_are_no_numbers_is_refused(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    spoil(folder / "model.safetensors", float("nan"))
    with pytest.raises(BadInputError, match="holds NaN or infinite numbers"):
        load_llm(folder)


@pytest.mark.parametrize("load", [load_diffusion, load_text_encoders])
def test_a_text_encoder_that_lacks_weights_is_refused(tiny_diffusion_folder, tmp_path, load):
    folder = Path(shutil.copytree(tiny_diffusion_folder, tmp_path / "diffusion"))
    without(folder / "text_encoder" / "model.safetensors", "k_proj.weight")
    with pytest.raises(BadInputError, match=r"lacks \d+ of the weights .*k_proj"):
        load(folder)


@pytest.mark.parametrize(
    "part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
)
def test_a_diffusion_model_whose_weights_are_no_numbers_is_refused(tiny_diffusion_folder, tmp_path, part):
    folder = Path(shutil.copytree(tiny_diffusion_folder, tmp_path / "diffusion"))
    spoil(folder / f"{part}.safetensors", float("inf"))
    with pytest.raises(BadInputError, match="holds NaN or infinite numbers"):
        load_diffusion(folder)


def test_a_unet_that_lacks_weights_is_refused(tiny_diffusion_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_diffusion_folder, tmp_path / "diffusion"))
    without(folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight")
    with pytest.raises(BadInputError):
        load_diffusion(folder)
