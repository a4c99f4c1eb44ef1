"""The storybook's diffusion model under ComfyUI's names, as far as that needs no ComfyUI: sizes, and what is refused.

That it computes the same there is tested in tests/comfyui/test_inside.py.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STORYBOOK = Path(__file__).parents[1] / "storybook" / "diffusers"
SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
}


@pytest.fixture
def loader(pack):
    return pack.part("nodes.diffusers_models")


@pytest.fixture
def copied(tmp_path):
    """The storybook's diffusion model under another name in ComfyUI's folder."""
    return Path(shutil.copytree(STORYBOOK, tmp_path / "comfyui" / "models" / "diffusers" / "mine"))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_stable_diffusion_1_5_is_described_with_the_numbers_that_comfyui_has_for_it(loader):
    known = {
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    }
    assert known.items() <= loader.unet_config(SD15).items()


def test_the_storybooks_unet_is_described_as_its_weights_are(loader):
    config = json.loads((STORYBOOK / "unet" / "config.json").read_text(encoding="utf-8"))
    (file,) = (STORYBOOK / "unet").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    attention = {found[0] for name in names if (found := re.match(r"\w+_blocks\.\d+\.attentions\.\d+", name))}
    resnets = {found[0] for name in names if (found := re.match(r"\w+_blocks\.\d+\.resnets\.\d+", name))}
    described = loader.unet_config(config)
    for side, key in (("down", "transformer_depth"), ("up", "transformer_depth_output")):
        assert sum(described[key]) == sum(name.startswith(side) for name in attention)
        assert len(described[key]) == sum(name.startswith(side) for name in resnets)


def test_a_widened_autoencoder_holds_the_narrow_one_and_zeros(loader):
    narrow = load_file(next((STORYBOOK / "vae").glob("*.safetensors")))
    wide = loader._vae(STORYBOOK / "vae").weights
    assert len(wide) == len(narrow) + 2
    for name, weight in narrow.items():
        side, _, layer, rest = name.split(".", 3)
        found = wide[f"taesd_{side}.{int(layer) + (side == 'decoder')}.{rest}"]
        inside = found[tuple(slice(size) for size in weight.shape)]
        assert torch.equal(inside, weight.float())
        assert found.count_nonzero() == weight.count_nonzero()
    assert wide["taesd_encoder.0.weight"].shape == (64, 3, 3, 3)
    assert wide["taesd_encoder.14.weight"].shape == (4, 64, 3, 3)
    assert wide["taesd_decoder.1.weight"].shape == (64, 4, 3, 3)
    assert wide["taesd_decoder.19.weight"].shape == (3, 64, 3, 3)
    inner = {
        tuple(weight.shape[:2]) for name, weight in wide.items() if ".conv." in name and weight.ndim == 4
    }
    assert inner == {(64, 64)}


def test_a_text_encoder_gets_comfyuis_names_and_number_of_tokens(loader):
    weights = loader._clip_weights(STORYBOOK / "text_encoder")
    assert all(name.startswith(("text_model.", "text_projection.")) for name in weights)
    plain = load_file(next((STORYBOOK / "text_encoder").glob("*.safetensors")))
    table = next(weight for name, weight in plain.items() if name.endswith("token_embedding.weight"))
    filled = weights["text_model.embeddings.token_embedding.weight"]
    assert len(filled) == 49408
    assert torch.equal(filled[: len(table)], table.float())
    assert not filled[len(table) :].any()


def test_a_model_in_two_files_is_refused(loader, copied):
    save_file({"a": torch.zeros(1)}, copied / "vae" / "more.safetensors")
    with pytest.raises(ValueError, match="vae holds 2 .safetensors files, expected one"):
        loader._vae(copied / "vae")


@pytest.mark.parametrize(
    "values", [{"_class_name": "AutoencoderKL"}, {"shift_factor": 0.5}, {"act_fn": "silu"}]
)
def test_another_kind_of_autoencoder_is_refused_by_what_sets_it_apart(loader, copied, values):
    change(copied / "vae" / "config.json", **values)
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; this loader knows"):
        loader._vae(copied / "vae")


def test_weights_of_a_model_that_were_changed_give_another_fingerprint(pack, copied):
    fingerprint = pack.nodes["MiniGPT5LoadDiffusers"].fingerprint_inputs
    first = fingerprint(model_name="mine")
    assert fingerprint(model_name="mine") == first != fingerprint(model_name="storybook")
    change(copied / "unet" / "config.json", longer=True)
    assert fingerprint(model_name="mine") != first
