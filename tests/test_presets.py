"""Presets in the decode loop and in a story, with an LLM whose next tokens are written down beforehand."""

from dataclasses import replace

import pytest
import torch

from minigpt5_core import cli
from minigpt5_core.conditioning import SPACES
from minigpt5_core.conditioning.mapper import build_mapper, compact_config
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.generate import Reply
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story import Story
from minigpt5_core.story.presets import DEFAULT, PRESETS, STORYBOOK, Preset
from minigpt5_core.story.prompts import CHAT, NEXT, Turn
from minigpt5_core.story.published_prompts import CC3M, MMDIALOG, VIST


@pytest.fixture
def scripted(tiny_llm, monkeypatch):
    """scripted(text): the LLM says that, "*" being [IMG0]; it begins anew with each reply."""

    def script(text: str):
        ids = [tiny_llm.voken_ids[0] if sign == "*" else tiny_llm.encode(sign)[0] for sign in text]
        said = iter([*ids, tiny_llm.tokenizer.eos_token_id] * 20)

        def logits(llm: FrozenLLM, states: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros(len(states), len(tiny_llm.tokenizer))
            scores[:, next(said)] = 1000.0
            return scores

        monkeypatch.setattr(FrozenLLM, "logits", logits)
        return tiny_llm

    return script


@pytest.fixture
def tell(tiny_diffusion_folder):
    """tell(llm, preset, scenes) -> the scenes, and the seed each was drawn with."""

    def run(llm, preset: Preset, scenes: int):
        mapper = build_mapper(compact_config(SPACES["storybook"], llm.width)).eval()
        teller = StoryTeller(llm, mapper, load_diffusion(tiny_diffusion_folder))
        seeds, draw = [], teller._draw
        teller._draw = lambda states, seed, *rest: seeds.append(seed) or draw(states, seed, *rest)
        return list(teller.tell(Story("Mia.", seed=7), scenes, steps=1, preset=preset)), seeds

    return run


def test_several_pictures_of_a_reply_are_several_scenes(scripted, tell):
    scenes, seeds = tell(scripted("One.*Two.*Three.*And on."), DEFAULT, 3)
    assert [scene.text for scene in scenes] == ["One.", "Two.", "Three. And on."]
    assert all(scene.picture for scene in scenes) and seeds == [7, 8, 9]


def test_no_more_scenes_are_told_than_asked_for_and_no_word_is_lost(scripted, tell):
    scenes, seeds = tell(scripted("One.*Two.*Three."), DEFAULT, 2)
    assert [scene.text for scene in scenes] == ["One.", "Two. Three."] and seeds == [7, 8]
    (scene,), _ = tell(scripted("One.*Two.*Three."), DEFAULT, 1)
    assert scene.text == "One. Two. Three."


def test_text_comes_before_the_first_picture_and_a_picture_always_comes(scripted, tell):
    scenes, _ = tell(scripted("Words alone."), DEFAULT, 1)
    assert scenes[0].text == "Words alone." and scenes[0].picture


def test_as_published_a_picture_comes_only_when_asked_for_and_only_the_first_is_drawn(scripted, tell):
    vist = PRESETS["published_vist"]
    scenes, seeds = tell(scripted("*###"), vist, 2)
    assert [scene.text for scene in scenes] == ["Mia.", ""]  # the opening is a scene that was only drawn
    scenes, seeds = tell(scripted("One.*Two.*###Human: no"), vist, 1)
    assert scenes[0].text == "One. Two." and seeds == [7]
    scenes, seeds = tell(scripted("Words alone.###"), vist, 1)
    assert scenes[0].picture is None and scenes[0].text == "Words alone." and seeds == []


def test_a_converted_checkpoint_is_addressed_as_it_was_trained_also_by_default(tiny_llm, scripted, tell):
    assert DEFAULT.wording_for(tiny_llm) is CHAT
    converted = replace(tiny_llm, bos_id=2)
    assert DEFAULT.wording_for(converted) is VIST and STORYBOOK.wording_for(converted) is VIST
    first, later = [Turn("Mia.")], [Turn(NEXT, "Mia."), Turn(NEXT)]
    sampling = DEFAULT.sampling_for(converted, first)
    assert (sampling.pictures, sampling.max_pictures, sampling.stop_strings) == ("first", 1, ("###",))
    scripted("12Babble.")  # the block takes two of its turns
    converted.causal_lm.config.max_position_embeddings = 1024  # here a token a letter
    scenes, seeds = tell(converted, DEFAULT, 2)
    assert [scene.text for scene in scenes] == ["Mia.", "Babble."] and seeds == [7, 8]
    assert DEFAULT.sampling_for(converted, later).pictures == "after_text"
    assert DEFAULT.sampling_for(tiny_llm, first) == DEFAULT.sampling


def test_the_published_settings_are_those_of_the_published_code():
    """model.py:302-307, mini_gpt5.py:287-317: temperature 1, top-p 0.9, top-k 50, penalty 2, 256 tokens."""
    for name, wording in (("vist", VIST), ("mmdialog", MMDIALOG), ("cc3m", CC3M)):
        preset = PRESETS[f"published_{name}"]
        sampling = preset.sampling
        assert preset.wording is wording and wording.stops == ("###",)
        drawn = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
        assert (*drawn, sampling.max_new_tokens) == (1.0, 0.9, 50, 2.0, 256)
        assert (preset.steps, preset.guidance) == (50, 7.5)
        assert preset.padded == (name != "cc3m")
    assert DEFAULT.sampling.repetition_penalty == 1.1 and not DEFAULT.padded


def test_a_padded_picture_is_seen_whole(tiny_llm, monkeypatch):
    seen = []
    monkeypatch.setattr(FrozenLLM, "see", lambda llm, picture: seen.append(picture))
    wide = torch.zeros(4, 8, 3)
    PRESETS["published_vist"].see(tiny_llm, wide)
    DEFAULT.see(tiny_llm, wide)
    assert seen[0].shape == (8, 8, 3) and seen[0][:2].eq(1).all() and seen[0][2:6].eq(0).all()
    assert seen[1] is wide


def test_a_reply_without_text_between_pictures_keeps_each_picture():
    states = torch.arange(3.0)[:, None, None].expand(3, 8, 4)
    reply = Reply([], "A", states, "end", ["", "A", "", ""])
    assert [(text, int(state[0, 0])) for text, state in reply.scenes(4)] == [("", 0), ("A", 1), ("", 2)]


def test_the_command_lines_presets_are_these():
    assert list(PRESETS) == list(cli.PRESETS)
