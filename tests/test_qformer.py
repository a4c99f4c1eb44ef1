"""The published way of a picture, against BLIP-2's sums written out here, from tensors under the published names."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from minigpt5_core.errors import BadInputError
from minigpt5_core.vision import picture_tensor
from minigpt5_core.vision.pictures import white_square
from minigpt5_core.vision.qformer import QFormerEncoder, build_qformer, header, load_qformer, normalise
from tests import published_files as files
from trainer.convert.report import Report
from trainer.convert.vision import vision_config, vision_tensors
from trainer.convert.written import save_checked

SIZES = files.Sizes()


@pytest.fixture(scope="module")
def encoder() -> QFormerEncoder:
    vit, qformer = files.filled(files.vit(SIZES), 2), files.filled(files.qformer(SIZES), 3)
    projection = files.filled(files.projection(SIZES), 4)
    tensors = vision_tensors(vit, qformer, Report())
    tensors |= {name.replace("llama_proj", "projector"): tensor for name, tensor in projection.items()}
    config = vision_config(tensors, SIZES.llm_width, SIZES.vit_heads, SIZES.qformer_heads)
    return build_qformer(config, tensors, "test")


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


def eva(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    patches = pixels.unfold(2, SIZES.patch, SIZES.patch).unfold(3, SIZES.patch, SIZES.patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # rows of patches, each c, h, w
    x = linear(patches, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"])
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1) + w["pos_embed"]
    for block in range(SIZES.vit_blocks):
        b = {
            name.removeprefix(f"blocks.{block}."): t
            for name, t in w.items()
            if name.startswith(f"blocks.{block}.")
        }
        inner = layer_norm(x, x.shape[-1:], b["norm1.weight"], b["norm1.bias"], 1e-6)
        query, key, value = (inner @ part.T for part in b["attn.qkv.weight"].chunk(3))
        told = attend(query + b["attn.q_bias"], key, value + b["attn.v_bias"], SIZES.vit_heads)
        x = x + linear(told, b["attn.proj.weight"], b["attn.proj.bias"])
        inner = layer_norm(x, x.shape[-1:], b["norm2.weight"], b["norm2.bias"], 1e-6)
        inner = gelu(linear(inner, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + linear(inner, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x


def bert(w: dict[str, Tensor], seen: Tensor) -> Tensor:
    def dense(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = norm("Qformer.bert.embeddings.LayerNorm", w["query_tokens"].expand(len(seen), -1, -1))
    for layer in range(SIZES.qformer_layers):
        stem = f"Qformer.bert.encoder.layer.{layer}"
        for attention in ("attention",) if layer % 2 else ("attention", "crossattention"):
            source = x if attention == "attention" else seen
            part = f"{stem}.{attention}"
            told = attend(
                dense(f"{part}.self.query", x),
                dense(f"{part}.self.key", source),
                dense(f"{part}.self.value", source),
                SIZES.qformer_heads,
            )
            x = norm(f"{part}.output.LayerNorm", dense(f"{part}.output.dense", told) + x)
        inner = gelu(dense(f"{stem}.intermediate_query.dense", x))
        x = norm(f"{stem}.output_query.LayerNorm", dense(f"{stem}.output_query.dense", inner) + x)
    return x


def test_the_encoder_computes_what_blip_2_computes(encoder):
    vit, qformer = files.filled(files.vit(SIZES), 2), files.filled(files.qformer(SIZES), 3)
    projection = files.filled(files.projection(SIZES), 4)
    pixels = torch.randn(2, 3, SIZES.size, SIZES.size)
    seen = eva(vit, pixels)
    seen = layer_norm(seen, seen.shape[-1:], qformer["ln_vision.weight"], qformer["ln_vision.bias"], 1e-5)
    expected = linear(bert(qformer, seen), projection["llama_proj.weight"], projection["llama_proj.bias"])
    assert torch.allclose(encoder(pixels), expected, atol=1e-4)
    assert encoder(pixels).shape == (2, SIZES.queries, SIZES.llm_width)
    assert encoder.vision_model.post_layernorm.eps == 1e-5


def test_a_saved_encoder_comes_back_in_the_precision_asked_for(encoder, tmp_path):
    file = tmp_path / "qformer.safetensors"
    save_checked(encoder.state_dict(), file, header(encoder.config))
    pixels = torch.randn(1, 3, SIZES.size, SIZES.size)
    assert torch.equal(load_qformer(file)(pixels), encoder(pixels))
    half = load_qformer(file, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(pixels.bfloat16()).dtype == torch.bfloat16


def test_another_file_in_its_place_is_bad_input(encoder, tmp_path):
    file = tmp_path / "qformer.safetensors"
    save_checked({"a": torch.zeros(1)}, file, {})
    with pytest.raises(BadInputError, match="expected 1 and the key minigpt5.qformer"):
        load_qformer(file)
    save_checked({"a": torch.zeros(1)}, file, header(encoder.config))
    with pytest.raises(
        BadInputError, match="tensors of the vision path are not as they should be: .* differ; a is"
    ):
        load_qformer(file)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (84, 56), (28, 63), (41, 30)])
def test_a_picture_becomes_its_middle_square_in_clips_scale(encoder, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # as torchvision's Resize and CenterCrop compute it
    short = min(width, height)
    image = image.resize((int(28 * width / short), int(28 * height / short)), Image.Resampling.BILINEAR)
    left, top = round((image.width - 28) / 2), round((image.height - 28) / 2)
    square = np.asarray(image, dtype=np.float32)[top : top + 28, left : left + 28] / 255
    expected = (square - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    found = encoder.prepare(picture_tensor(Image.fromarray(pixels))[None])
    assert found.shape == (1, 3, 28, 28)
    assert np.allclose(found[0].movedim(0, -1).numpy(), expected, atol=1e-5)


def test_a_white_square_holds_the_whole_picture_in_its_middle():
    square = white_square(torch.zeros(4, 11, 3))
    assert square.shape == (11, 11, 3)
    assert square[3:7].max() == 0 and square[:3].min() == 1 and square[7:].min() == 1
    assert torch.equal(white_square(square), square)


def test_white_is_one_in_every_channel_before_clips_scale():
    assert torch.allclose(
        normalise(torch.ones(1, 1, 3))[:, 0, 0], torch.tensor([1.9303361, 2.0748837, 2.1458850]), atol=1e-5
    )
