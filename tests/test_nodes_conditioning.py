"""Vokens to conditioning in the graph: shapes, blends by hand, and what does not fit is refused before sampling."""

import logging
from types import SimpleNamespace

import pytest
import torch

from minigpt5_core.conditioning import SPACES, Space
from minigpt5_core.conditioning.mapper import build_mapper
from minigpt5_core.conditioning.mapper_file import MapperHeader, load_mapper, save_mapper
from minigpt5_core.config import MapperConfig
from tests.elsewhere import Elsewhere

PLAIN, POOLED = Space("toy", 5, 12), Space("toy", 5, 12, 6)
# What ComfyUI's MODELs say of themselves, by the space that they take.
MODELS = {
    "sd15": {"context_dim": 768, "adm_in_channels": None},
    "sd21": {"context_dim": 1024, "adm_in_channels": None},
    "sdxl": {"context_dim": 2048, "adm_in_channels": 2816},
    "sd3": {"context_embedder_config": {"params": {"in_features": 4096}}, "adm_in_channels": 2048},
    "flux": {"context_in_dim": 4096, "vec_in_dim": 768},
    "storybook": {"context_dim": 128, "adm_in_channels": None},
}


def toy_mapper(space=PLAIN):
    torch.manual_seed(0)
    sizes = {"tokens": space.tokens, "width": space.width, "pooled_width": space.pooled_width}
    return build_mapper(
        MapperConfig("compact", 3, 16, hidden=12, heads=2, layers=1, feed_forward=24, **sizes)
    ).eval()


def assert_close(found, expected):
    """torch has another kernel where no gradient is wanted."""
    assert torch.allclose(found, expected, atol=1e-5)


def model(config, channels=4):
    """A MODEL as far as its description goes."""
    latents = SimpleNamespace(latent_channels=channels)
    return SimpleNamespace(
        model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)),
        get_model_object={"latent_format": latents}.__getitem__,
    )


def model_of(space):
    return model(MODELS[space], SPACES[space].latent_channels)


@pytest.fixture
def make_mapper(pack):
    """make_mapper(space) -> a MAPPER of our own socket; without weights where `network` is None."""

    def make(space=PLAIN, network=toy_mapper):
        header = MapperHeader(space, "toy-llm", 16, "abc")
        return pack.part("nodes.sockets").LoadedMapper(network and network(space), header, "my.safetensors")

    return make


@pytest.fixture
def vokens(pack):
    """Of two pictures."""
    states = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    return pack.part("nodes.sockets").Vokens(states, "toy-llm", "abc")


@pytest.fixture
def convert(pack):
    return lambda **inputs: pack.run("MiniGPT5VokensToConditioning", **inputs).args


def test_vokens_become_comfyuis_positive_and_negative(convert, make_mapper, vokens):
    mapper = make_mapper()
    positive, negative = convert(vokens=vokens, mapper=mapper)
    ((tokens, extra),) = positive
    assert extra == {}
    assert_close(tokens, mapper.mapper(vokens.states[:1]).tokens)
    ((tokens, extra),) = negative
    assert extra == {}
    assert_close(tokens, mapper.mapper(torch.zeros(1, 3, 16)).tokens)
    assert not any(side[0][0].requires_grad for side in (positive, negative))


def test_a_pooled_vector_comes_under_comfyuis_name(convert, make_mapper, vokens):
    mapper = make_mapper(POOLED)
    (positive,), (negative,) = convert(vokens=vokens, mapper=mapper)
    assert_close(positive[1]["pooled_output"], mapper.mapper(vokens.states[:1]).pooled)
    assert negative[1]["pooled_output"].shape == (1, 6)


def test_half_precision_vokens_are_taken(convert, make_mapper, vokens, pack):
    half = pack.part("nodes.sockets").Vokens(vokens.states.half(), "toy-llm", "abc")
    ((tokens, _),) = convert(vokens=half, mapper=make_mapper())[0]
    assert tokens.dtype == torch.float32


def test_each_picture_of_a_turn_has_its_own_vokens(convert, make_mapper, vokens):
    mapper = make_mapper()
    ((tokens, _),) = convert(vokens=vokens, mapper=mapper, picture=2)[0]
    assert_close(tokens, mapper.mapper(vokens.states[1:]).tokens)


def test_a_picture_that_the_turn_has_not_is_refused_with_their_number(convert, make_mapper, vokens):
    with pytest.raises(ValueError, match=r"has 2 picture\(s\); picture is set to 3"):
        convert(vokens=vokens, mapper=make_mapper(), picture=3)


def test_a_turn_without_a_picture_is_refused_with_how_to_get_one(convert, make_mapper, pack):
    nothing = pack.part("nodes.sockets").Vokens(torch.zeros(0, 3, 16), "toy-llm", "abc")
    with pytest.raises(ValueError, match="asked for no picture.*Story Turn.*'after_text'"):
        convert(vokens=nothing, mapper=make_mapper())


@pytest.mark.parametrize("shape", [(1, 8, 16), (1, 3, 32)])
def test_vokens_of_another_number_or_width_are_refused_with_both_sides(convert, make_mapper, pack, shape):
    other = pack.part("nodes.sockets").Vokens(torch.zeros(shape), "toy-llm", "abc")
    with pytest.raises(ValueError) as caught:
        convert(vokens=other, mapper=make_mapper())
    assert str(shape) in str(caught.value) and "3 vokens, 16 wide" in str(caught.value)


@pytest.mark.parametrize(("weights_hash", "warnings"), [("abc", 0), ("other", 1)])
def test_vokens_of_other_weights_are_taken_with_a_warning(
    convert, make_mapper, vokens, pack, caplog, weights_hash, warnings
):
    theirs = pack.part("nodes.sockets").Vokens(vokens.states, "their-llm", weights_hash)
    with caplog.at_level(logging.WARNING, "minigpt5"):
        convert(vokens=theirs, mapper=make_mapper())
    assert len(caplog.records) == warnings
    assert all("my.safetensors" in text and "their-llm" in text for text in caplog.messages)


# Against a MODEL


@pytest.mark.parametrize("name", MODELS)
def test_a_mapper_fits_the_models_of_its_space_and_no_others(pack, make_mapper, name):
    check = pack.part("nodes.conditioning").check_model
    mapper = make_mapper(SPACES[name], network=None)
    check(model_of(name), mapper)
    for other in MODELS.keys() - {name}:
        with pytest.raises(ValueError) as caught:
            check(model_of(other), mapper)
        assert f"answers in the space {SPACES[name]}, but" in str(caught.value)
        assert f"this MODEL takes {SPACES[other]}." in str(caught.value)


def test_a_model_of_the_same_width_with_other_latents_is_refused_with_both_numbers(pack, make_mapper):
    mapper = make_mapper(SPACES["sdxl"], network=None)
    with pytest.raises(ValueError, match="my.safetensors.*sdxl .*have 4 channels; this MODEL's have 16"):
        pack.part("nodes.conditioning").check_model(model(MODELS["sdxl"], channels=16), mapper)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_computed(convert, make_mapper, vokens):
    mapper = make_mapper(SPACES["sd15"], network=None)
    with pytest.raises(ValueError, match=r"my.safetensors.*sd15 \(77 x 768\).*another \(77 x 320\)"):
        convert(vokens=vokens, mapper=mapper, model=model({"context_dim": 320}))


def test_the_storybooks_mapper_says_which_model_it_wants(pack, make_mapper):
    mapper = make_mapper(SPACES["storybook"], network=None)
    with pytest.raises(ValueError, match=r"Load Diffusers Model.*mapper that was trained for sd15"):
        pack.part("nodes.conditioning").check_model(model_of("sd15"), mapper)


@pytest.mark.parametrize(
    "unknown",
    [model({}), model(None), SimpleNamespace(model=SimpleNamespace())],
    ids=["empty", "none", "bare"],
)
def test_a_model_that_says_nothing_of_itself_is_taken(convert, make_mapper, vokens, unknown):
    assert convert(vokens=vokens, mapper=make_mapper(), model=unknown)


# Blended with a text


def text_conditioning(tokens=5, batch=1, width=12, **extra):
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(batch, tokens, width, generator=generator), extra]]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_blend_goes_from_vokens_to_text_in_a_straight_line(convert, make_mapper, vokens, strength):
    mapper, text = make_mapper(), text_conditioning()
    ours, theirs = mapper.mapper(vokens.states[:1]).tokens, text[0][0]
    positive, negative = convert(vokens=vokens, mapper=mapper, text=text, text_strength=strength)
    assert_close(positive[0][0], (1 - strength) * ours + strength * theirs)
    assert torch.equal(negative[0][0], convert(vokens=vokens, mapper=mapper)[1][0][0])


@pytest.mark.parametrize("tokens", [3, 7])
def test_the_shorter_side_of_a_blend_is_filled_with_zeros(convert, make_mapper, vokens, tokens):
    mapper, text = make_mapper(), text_conditioning(tokens)
    expected = torch.zeros(1, max(5, tokens), 12)
    expected[:, :5] += 0.75 * mapper.mapper(vokens.states[:1]).tokens
    expected[:, :tokens] += 0.25 * text[0][0]
    ((mixed, _),) = convert(vokens=vokens, mapper=mapper, text=text, text_strength=0.25)[0]
    assert_close(mixed, expected)


def test_pooled_vectors_are_blended_too_and_all_else_of_the_text_is_kept(convert, make_mapper, vokens):
    mapper, pooled = make_mapper(POOLED), torch.ones(1, 6)
    text = text_conditioning(pooled_output=pooled, guidance=3.5)
    ((_, extra),) = convert(vokens=vokens, mapper=mapper, text=text, text_strength=0.25)[0]
    ours = mapper.mapper(vokens.states[:1]).pooled
    assert_close(extra["pooled_output"], 0.75 * ours + 0.25 * pooled)
    assert extra["guidance"] == 3.5


def test_a_text_without_a_pooled_vector_gets_that_of_the_vokens(convert, make_mapper, vokens):
    mapper = make_mapper(POOLED)
    ((_, extra),) = convert(vokens=vokens, mapper=mapper, text=text_conditioning())[0]
    assert_close(extra["pooled_output"], mapper.mapper(vokens.states[:1]).pooled)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_at_its_ends_a_blend_is_the_one_side_alone(convert, make_mapper, vokens, strength):
    mapper, text = make_mapper(), text_conditioning(7 if strength == 0 else 3)
    ((mixed, _),) = convert(vokens=vokens, mapper=mapper, text=text, text_strength=strength)[0]
    assert mixed.shape == ((1, 5, 12) if strength == 0 else (1, 3, 12))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_text_that_stays_on_the_gpu_is_blended_in(convert, make_mapper, vokens, strength):
    """As ComfyUI's --gpu-only has it; the sampler moves what it is given."""
    pooled = torch.ones(1, 6)
    ((tokens, _),) = text_conditioning()
    here, there = (
        [[tokens, {"pooled_output": pooled}]],
        [[tokens.as_subclass(Elsewhere), {"pooled_output": pooled.as_subclass(Elsewhere)}]],
    )
    given = {"vokens": vokens, "mapper": make_mapper(POOLED), "text_strength": strength}
    ((expected, more),), ((found, extra),) = (convert(text=text, **given)[0] for text in (here, there))
    assert torch.equal(found, expected) and torch.equal(extra["pooled_output"], more["pooled_output"])


@pytest.mark.parametrize("blended", [False, True])
def test_all_comes_out_where_comfyui_has_what_its_text_encoders_answer(
    host, convert, make_mapper, vokens, monkeypatch, blended
):
    """Its Concat and Average mix both, and move neither: on the GPU with --gpu-only. torch's meta stands for it."""
    place = torch.device("meta")
    monkeypatch.setattr(host("comfy.model_management"), "intermediate_device", lambda: place)
    text = text_conditioning(pooled_output=torch.ones(1, 6)) if blended else None
    for ((tokens, extra),) in convert(vokens=vokens, mapper=make_mapper(POOLED), text=text):
        assert tokens.device == extra["pooled_output"].device == place


def test_every_entry_and_every_row_of_a_text_is_blended(convert, make_mapper, vokens):
    text = text_conditioning(batch=2) + text_conditioning()
    blended = convert(vokens=vokens, mapper=make_mapper(), text=text, text_strength=0.5)[0]
    assert [tuple(tokens.shape) for tokens, _ in blended] == [(2, 5, 12), (1, 5, 12)]


def test_a_text_of_another_width_is_refused_with_both_sides(convert, make_mapper, vokens):
    with pytest.raises(ValueError, match=r"text conditioning is 20 wide.*my.safetensors.*toy \(5 x 12\)"):
        convert(vokens=vokens, mapper=make_mapper(), text=text_conditioning(width=20))


def test_blending_changes_nothing_that_came_in(convert, make_mapper, vokens):
    mapper, text = make_mapper(POOLED), text_conditioning(pooled_output=torch.ones(1, 6))
    given = [vokens.states, text[0][0], text[0][1]["pooled_output"]]
    before = [tensor.clone() for tensor in given]
    negative = convert(vokens=vokens, mapper=mapper, text=text, text_strength=0.5)[1]
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert list(text[0][1]) == ["pooled_output"]
    assert text[0][1]["pooled_output"] is given[2]
    negative[0][1]["pooled_output"] = None  # another node's doing
    assert convert(vokens=vokens, mapper=mapper)[1][0][1]["pooled_output"] is not None


# Load Voken Mapper


def test_a_mapper_file_is_loaded_with_what_it_says_of_itself(pack, tmp_path, vokens, convert):
    file = tmp_path / "comfyui" / "models" / "voken_mappers" / "mine" / "mapper.safetensors"
    header = MapperHeader(POOLED, "toy-llm", 16, "abc", {"stage": "align"})
    save_mapper(file, toy_mapper(POOLED), header)
    (loaded,) = pack.run("MiniGPT5LoadMapper", mapper_name="mine/mapper.safetensors").args
    assert loaded.name == "mine/mapper.safetensors"
    assert (loaded.header.llm_id, str(loaded.header.space)) == ("toy-llm", str(POOLED))
    ((tokens, _),) = convert(vokens=vokens, mapper=loaded)[0]
    assert_close(tokens, load_mapper(file)[0](vokens.states[:1]).tokens)


def test_a_file_that_is_no_mapper_is_refused_by_name(pack, tmp_path):
    file = tmp_path / "comfyui" / "models" / "voken_mappers" / "bad.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not this")
    with pytest.raises(ValueError, match="bad.safetensors"):
        pack.run("MiniGPT5LoadMapper", mapper_name="bad.safetensors")
