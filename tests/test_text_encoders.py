"""Text encoders alone, from folders and from checkpoint files: the answers are those of the whole model."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minigpt5_core.errors import BadInputError
from tests.toy_diffusion import STORYBOOK, save
from trainer.diffusion import checkpoint_file, lacks_a_denoiser, load_frozen_diffusion, load_text_encoders
from trainer.diffusion.checkpoint_file import KINDS, Reader, read_tokenizer, text_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["a fox", "a bear in the snow"]
REST = ("unet", "transformer", "vae", "scheduler")
FAMILIES = pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "storybook"])


@pytest.fixture
def folder(family, tmp_path, tiny_diffusion_folder):
    """A toy of the family, as diffusers saves it."""
    if family == "storybook":
        shutil.copytree(tiny_diffusion_folder, tmp_path / family)
    else:
        save(family, tmp_path / family)
    return tmp_path / family


def assert_same_answers(one, other):
    expected, found = one.encode(TEXTS), other.encode(TEXTS)
    assert torch.equal(expected.tokens, found.tokens) and one.pools == other.pools
    assert expected.pooled is None or torch.equal(expected.pooled, found.pooled)


def modules(diffusion):
    return [name for name, part in diffusion.pipeline.components.items() if isinstance(part, nn.Module)]


@FAMILIES
@pytest.mark.parametrize("cut", ["nothing", "the rest", "the rest and the index"])
def test_text_encoders_answer_as_in_the_whole_model(folder, family, cut):
    whole = load_frozen_diffusion(folder)
    if cut != "nothing":
        for name in REST:
            shutil.rmtree(folder / name, ignore_errors=True)
    if cut == "the rest and the index":
        (folder / "model_index.json").unlink()
    assert lacks_a_denoiser(folder) == (cut != "nothing")
    alone = load_text_encoders(folder)
    assert whole.draws and not alone.draws
    assert modules(alone) == [name for name in modules(whole) if name.startswith("text_encoder")]
    assert not any(p.requires_grad for part in alone.text_encoders() for p in part.parameters())
    assert_same_answers(whole, alone)
    assert alone.token_ids("a fox") == whole.token_ids("a fox")


@pytest.mark.parametrize("family", ["storybook"])
def test_an_index_that_names_nothing_but_text_encoders_is_enough(folder):
    whole = load_frozen_diffusion(folder)
    index = json.loads((folder / "model_index.json").read_text())
    kept = {
        name: value for name, value in index.items() if name in ("_class_name", "text_encoder", "tokenizer")
    }
    (folder / "model_index.json").write_text(json.dumps(kept))
    assert_same_answers(whole, load_text_encoders(folder))


@pytest.mark.parametrize("family", ["sd3"])
def test_sd3_without_t5_answers_with_zeros_of_its_transformers_width(folder):
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    whole, alone = load_frozen_diffusion(folder), load_text_encoders(folder)
    assert_same_answers(whole, alone)
    assert alone.answer_settings == whole.answer_settings == "154 x 48"


@pytest.mark.parametrize("family", ["storybook"])
def test_half_precision_is_given_when_asked_for(folder):
    alone = load_text_encoders(folder, "bf16")
    assert {p.dtype for part in alone.text_encoders() for p in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["sdxl"])
def test_a_folder_that_lacks_a_tokenizer_is_refused(folder):
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(BadInputError, match="lacks tokenizer_2, as diffusers saves them"):
        load_text_encoders(folder)


def test_a_folder_of_no_known_family_is_refused(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(
        BadInputError, match=r"of no known family: text_encoder \(BertModel\). Expected text_encoder"
    ):
        load_text_encoders(tmp_path)
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="does not say which text encoder it is of"):
        load_text_encoders(tmp_path)


@pytest.mark.parametrize("family", ["storybook"])
def test_no_code_of_a_folder_without_an_index_is_run(folder):
    (folder / "model_index.json").unlink()
    (folder / "text_encoder" / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(BadInputError, match="brings Python code of its own"):
        load_text_encoders(folder)


# checkpoint files


VOCABULARY = CLIPTokenizer.from_pretrained(STORYBOOK / "tokenizer")


def clip(kind=CLIPTextModel, width=64, layers=2, act="quick_gelu", projection=64):
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=77, hidden_act=act, projection_dim=projection,
        bos_token_id=len(VOCABULARY) - 2, eos_token_id=len(VOCABULARY) - 1, initializer_range=0.5,
    )  # fmt: skip
    return kind(config).eval()


def as_clip(model, prefix):
    """The weights as checkpoints of SD 1.5 hold them."""
    bare = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    named = {f"{prefix}text_model.{name}": value for name, value in bare.items()}
    return named | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


class OpenClip(nn.Module):
    """OpenCLIP's text model with its own names, from its paper's parts: pre-norm layers of `nn.MultiheadAttention`."""

    def __init__(self, width, layers, projection):
        super().__init__()
        torch.manual_seed(7)
        self.token_embedding = nn.Embedding(len(VOCABULARY), width)
        self.positional_embedding = nn.Parameter(torch.randn(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, projection))

    def forward(self, ids, drops=0):
        """States after all layers but the last `drops`, not normed; and the pooled vector (of all)."""
        mask = torch.full((77, 77), -torch.inf).triu(1)
        states = [self.token_embedding(ids) + self.positional_embedding]
        for block in self.transformer.resblocks:
            states.append(block(states[-1], mask))
        ends = (ids == len(VOCABULARY) - 1).int().argmax(1)
        pooled = self.ln_final(states[-1])[torch.arange(len(ids)), ends] @ self.text_projection
        return states[-1 - drops], pooled


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, states, mask):
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return states + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(states))))


def named(model, prefix):
    return {f"{prefix}{name}": value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes tensors as a checkpoint with a UNet's in it, and the tokenizer beside it."""
    shutil.copytree(STORYBOOK / "tokenizer", tmp_path / "tokenizer")

    def write(tensors, name="model.safetensors"):
        rest = {
            "model.diffusion_model.out.2.weight": torch.zeros(4),
            "cond_stage_model.logit_scale": torch.ones(1),
        }
        save_file({name: value.contiguous() for name, value in (rest | tensors).items()}, tmp_path / name)
        return tmp_path / name

    return write


def ids_of(pad):
    tokenizer = read_tokenizer(STORYBOOK / "tokenizer", pad, len(VOCABULARY))
    return torch.tensor(tokenizer(TEXTS, padding="max_length", max_length=77).input_ids)


@pytest.fixture(autouse=True)
def pads(monkeypatch):
    """The storybook's vocabulary has no "!", which OpenCLIP pads with."""
    pad = VOCABULARY.convert_ids_to_tokens(0)
    plain = Reader.pad.fget
    monkeypatch.setattr(Reader, "pad", property(lambda self: pad if self.open_clip else plain(self)))
    return pad


def test_a_checkpoint_of_sd15_answers_as_its_text_encoder(checkpoint):
    model = clip()
    file = checkpoint(
        {
            k: v.half() if v.is_floating_point() else v
            for k, v in as_clip(model, "cond_stage_model.transformer.").items()
        }
    )
    assert lacks_a_denoiser(file)
    found = load_text_encoders(file)
    expected = clip().half().float()(ids_of("<|endoftext|>")).last_hidden_state
    assert type(found.pipeline) is StableDiffusionPipeline and modules(found) == ["text_encoder"]
    assert torch.allclose(found.encode(TEXTS).tokens, expected, atol=1e-6)
    assert (
        found.text_encoders()[0].config.hidden_act == "quick_gelu"
        and found.encode(TEXTS).tokens.dtype == torch.float32
    )


def test_a_checkpoint_of_sd2_answers_without_its_last_layer(checkpoint, pads):
    model = OpenClip(64, 3, 64).eval()
    found = load_text_encoders(
        checkpoint(
            named(model, "cond_stage_model.model.") | {"cond_stage_model.model.logit_scale": torch.ones(())}
        )
    )
    expected = model.ln_final(model(ids_of(pads), drops=1)[0])
    assert found.text_encoders()[0].config.num_hidden_layers == 2
    assert torch.allclose(found.encode(TEXTS).tokens, expected, atol=1e-5)


def test_a_checkpoint_of_sdxl_answers_with_both_text_encoders_side_by_side(checkpoint, pads):
    first, second = clip(), OpenClip(128, 2, 32).eval()
    file = checkpoint(
        as_clip(first, "conditioner.embedders.0.transformer.")
        | named(second, "conditioner.embedders.1.model.")
    )
    answer = load_text_encoders(file).encode(TEXTS)
    left = first(ids_of("<|endoftext|>"), output_hidden_states=True).hidden_states[-2]
    right, pooled = second(ids_of(pads), drops=1)[0], second(ids_of(pads))[1]
    assert answer.tokens.shape == (2, 77, 192) and answer.pooled.shape == (2, 32)
    assert torch.allclose(answer.tokens, torch.cat([left, right], -1), atol=1e-5)
    assert torch.allclose(answer.pooled, pooled, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"holds no text encoders of SD 1.5, SD 2.x or SDXL: none of its 2 tensors .* Give a whole checkpoint"),
        ({"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(3)}, "lacks 1 tensors, such as"),
    ],
)  # fmt: skip
def test_a_file_without_text_encoders_is_refused(checkpoint, tensors, message):
    with pytest.raises(BadInputError, match=message):
        load_text_encoders(checkpoint(tensors))


def test_a_text_encoder_that_is_not_whole_or_of_another_shape_is_refused(tmp_path):
    reader = KINDS["StableDiffusionPipeline"][0]
    held = {name.removeprefix("x."): value for name, value in as_clip(clip(), "x.").items()}
    lacking = {name: value for name, value in held.items() if "layers.1.mlp.fc2" not in name}
    with pytest.raises(BadInputError, match="lacks 2 tensors, such as .*layers.1.mlp.fc2.bias"):
        text_encoder(tmp_path, reader, lacking, torch.float32)
    other = held | {"text_model.final_layer_norm.bias": torch.ones(3)}
    with pytest.raises(
        BadInputError, match=r"has tensors that a CLIP of its size has not, .*final_layer_norm.bias \(3,\)"
    ):
        text_encoder(tmp_path, reader, other, torch.float32)


def test_a_file_cut_short_and_a_pickle_are_refused(checkpoint, tmp_path):
    file = checkpoint(as_clip(clip(), "cond_stage_model.transformer."))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="cannot be read: .* Copy it again"):
        load_text_encoders(file)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"is no \.safetensors file, and no other is read"):
        load_text_encoders(tmp_path / "model.ckpt")


# the tokenizer


def test_the_tokenizer_is_looked_for_where_comfyui_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "try_to_load_from_cache", lambda *given: None)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "elsewhere"))
    models = tmp_path / "ComfyUI" / "models" / "checkpoints"
    models.mkdir(parents=True)
    file = models / "model.safetensors"
    with pytest.raises(
        BadInputError, match=r"none was found for model.safetensors. .* hf download openai/clip"
    ):
        checkpoint_file.find_tokenizer(file)
    with pytest.raises(BadInputError, match="tokenizer is gone, which lacks them"):
        checkpoint_file.find_tokenizer(file, "gone")
    for folder in (
        "elsewhere/comfy/sd1_tokenizer",
        "ComfyUI/comfy/sd1_tokenizer",
        "ComfyUI/models/checkpoints/tokenizer",
    ):
        shutil.copytree(STORYBOOK / "tokenizer", tmp_path / folder)
        assert checkpoint_file.find_tokenizer(file) == tmp_path / folder
    assert checkpoint_file.find_tokenizer(file, str(STORYBOOK / "tokenizer")) == STORYBOOK / "tokenizer"


def test_a_tokenizer_of_another_vocabulary_is_refused():
    with pytest.raises(
        BadInputError, match=f"has {len(VOCABULARY)} tokens, the checkpoint's text encoder 49408"
    ):
        read_tokenizer(STORYBOOK / "tokenizer", "<|endoftext|>", 49408)
