"""The LLM's eyes: shapes, files, where image tokens stand, and that a blind LLM reads as before."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling, StoryCache, embed_prompt, generate
from minigpt5_core.llm import load_llm, load_vision
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.story.prompts import DESCRIBE, LOOK, Turn, chat_prompt, chat_text, fit_prompt
from minigpt5_core.vision import (
    ImageAdapterHeader,
    ImageEncoder,
    ImageEncoderConfig,
    load_image_adapter,
    save_image_adapter,
    to_square,
)
from minigpt5_core.vision.image_adapter import IMAGE_ADAPTER

CONFIG = ImageEncoderConfig(llm_width=32, size=16, tokens=3, channels=[4, 8], hidden=12, heads=2, layers=1)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ImageEncoder(CONFIG).eval()


@pytest.fixture
def seeing(tiny_llm, encoder):
    return tiny_llm.with_vision(encoder)


def header(hash="abc", width=32):
    return ImageAdapterHeader("tiny", width, hash, {"steps": 1})


def picture(seed=0, height=16, width=16):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_a_picture_becomes_a_few_vectors_of_the_llms_width(encoder):
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 3, 32)


def test_a_file_gives_back_what_was_saved(encoder, tmp_path):
    save_image_adapter(tmp_path / IMAGE_ADAPTER, encoder, header())
    loaded, found = load_image_adapter(tmp_path / IMAGE_ADAPTER)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), encoder(images))
    assert found == header() and loaded.config == CONFIG and not loaded.training


def test_half_a_file_and_another_kind_of_file_are_refused(encoder, tmp_path):
    path = tmp_path / IMAGE_ADAPTER
    save_image_adapter(path, encoder, header())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match="not a whole safetensors file"):
        load_image_adapter(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(BadInputError, match="is no image adapter: its header lacks minigpt5.format_version"):
        load_image_adapter(path)


def test_a_file_of_other_sizes_than_its_header_says_is_refused(encoder, tmp_path):
    path = tmp_path / IMAGE_ADAPTER
    encoder.config = dataclasses.replace(CONFIG, tokens=4)
    save_image_adapter(path, encoder, header())
    with pytest.raises(BadInputError, match="queries"):
        load_image_adapter(path)


@pytest.mark.parametrize(
    "change", [{"size": 18}, {"heads": 5}, {"tokens": 0}, {"channels": []}, {"layers": 1.5}]
)
def test_sizes_that_cannot_be_built_are_refused(change):
    with pytest.raises(BadInputError, match="Image encoder config"):
        dataclasses.replace(CONFIG, **change)


def test_the_middle_square_is_taken_and_scaled():
    wide = torch.zeros(1, 16, 32, 3)
    wide[:, :, 8:24] = 1.0  # the middle
    assert torch.equal(to_square(wide, 16), torch.ones(1, 3, 16, 16))
    assert torch.allclose(
        to_square(torch.full((1, 64, 48, 3), 0.5), 16), torch.zeros(1, 3, 16, 16), atol=1e-6
    )


def test_a_picture_is_encoded_once(seeing, monkeypatch):
    first = seeing.see(picture())
    monkeypatch.setattr(ImageEncoder, "forward", lambda *given: pytest.fail("encoded again"))
    assert seeing.see(picture()) is first


def test_a_blind_llm_sees_nothing(tiny_llm):
    assert tiny_llm.see(picture()) is None


def test_image_tokens_stand_where_the_picture_stands(seeing):
    shown = seeing.see(picture())
    turns = [Turn(LOOK, "A fox.", picture=False, image_tokens=shown), Turn(DESCRIBE)]
    prompt = chat_prompt(seeing, turns)
    before, behind = chat_text(seeing, turns).split("[PICTURE]")
    assert before.endswith("A fox.")
    by_hand = [seeing.embed(torch.tensor(seeing.encode(text))) for text in (before, behind)]
    assert torch.equal(embed_prompt(seeing, prompt), torch.cat((by_hand[0], shown, by_hand[1])))
    assert prompt.length == len(embed_prompt(seeing, prompt))


def test_a_picture_behind_its_block(seeing):
    text = chat_text(seeing, [Turn("a", "b", image_tokens=seeing.see(picture())), Turn("c")])
    assert "b[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7][PICTURE]" in text


def test_what_is_seen_changes_what_is_told(seeing):
    def told(seed):
        turns = [
            Turn(
                LOOK,
                "",
                picture=False,
                image_tokens=torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)),
            ),
            Turn("and then?"),
        ]
        return generate(
            seeing, [chat_prompt(seeing, turns)], Sampling(max_new_tokens=8, temperature=0.0), [0]
        )[0].ids

    assert told(0) == told(0) != told(1)


def test_a_kept_story_with_pictures_goes_on_as_a_fresh_one(seeing):
    cache, first = StoryCache(), Turn("a", "b", image_tokens=seeing.see(picture(1)))
    sampling = Sampling(max_new_tokens=4)
    for turns in (
        [first, Turn("c")],
        [first, Turn("c", "d", image_tokens=seeing.see(picture(2))), Turn("e")],
    ):
        kept = generate(seeing, [chat_prompt(seeing, turns)], sampling, [3], cache)[0]
        fresh = generate(seeing, [chat_prompt(seeing, turns)], sampling, [3])[0]
        assert kept.ids == fresh.ids
        assert torch.allclose(kept.voken_states, fresh.voken_states, atol=1e-4)


def test_a_picture_takes_its_tokens_of_the_context(seeing):
    seeing.causal_lm.config.max_position_embeddings = 270
    turns = [Turn("a", "b" * 30, image_tokens=torch.zeros(3, 32)) for _ in range(3)]
    fitted = fit_prompt(seeing, [*turns, Turn("c")], room=10)
    assert fitted.dropped and fitted.prompt.length <= 260
    assert len(fitted.prompt.images) == 3 - len(fitted.dropped)


@pytest.mark.parametrize("text", ["[PICTURE]", "a [IMG0] b", "[IMG12]", "[[PICTURE]]", "[[[IMG3]]"])
def test_words_that_look_like_a_slot_are_words(seeing, text):
    prompt = chat_prompt(seeing, [Turn(text, text, picture=False), Turn(text)])
    assert not prompt.images and prompt.image_id is None
    assert not set(prompt.ids) & {*seeing.voken_ids, seeing.picture_id}


def test_an_adapter_in_the_folder_gives_sight(tiny_llm_folder, encoder, tmp_path):
    folder = tmp_path / "llm"
    folder.symlink_to(tiny_llm_folder)
    assert load_vision(load_llm(folder), folder).image_encoder is None
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny_llm_folder.iterdir():
        (own / file.name).symlink_to(file)
    before = hash_weights(own)
    save_image_adapter(own / IMAGE_ADAPTER, encoder, header())
    assert load_vision(load_llm(own), own).image_encoder is not None
    assert hash_weights(own) == before  # it is none of the LLM's weights


def test_a_spare_adapter_serves_only_the_weights_it_was_trained_for(tiny_llm_folder, encoder, tmp_path):
    spare = tmp_path / "spare.safetensors"
    save_image_adapter(spare, encoder, header("other"))
    assert load_vision(load_llm(tiny_llm_folder), tiny_llm_folder, spare).image_encoder is None
    save_image_adapter(spare, encoder, header(hash_weights(tiny_llm_folder)))
    assert load_vision(load_llm(tiny_llm_folder), tiny_llm_folder, spare).image_encoder is not None


def test_an_adapter_of_another_width_is_refused(tiny_llm_folder, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny_llm_folder.iterdir():
        (own / file.name).symlink_to(file)
    wide = ImageEncoder(dataclasses.replace(CONFIG, llm_width=48))
    save_image_adapter(own / IMAGE_ADAPTER, wide, header(width=48))
    with pytest.raises(BadInputError, match="width 48, but this one is 32 wide"):
        load_vision(load_llm(own), own)


def test_the_storybooks_adapter_is_whole_and_small():
    from minigpt5_core.story.storybook import STORYBOOK

    file = STORYBOOK / "LLM" / IMAGE_ADAPTER
    encoder, found = load_image_adapter(file)
    assert found.llm_width == 576 and encoder.config.tokens == 16
    assert sum(weight.numel() for weight in load_file(file).values()) < 2_000_000
