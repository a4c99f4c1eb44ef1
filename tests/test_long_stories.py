"""Stories longer than the LLM reads: trained on as they are told, and never read past what the LLM was made for."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Prompt, Sampling, generate
from minigpt5_core.llm import add_vokens
from minigpt5_core.story.prompts import NEXT, Turn, chat_text, fit_prompt
from tests.conftest import make_tiny_parts, make_tiny_tokenizer
from trainer.data.fitting import fitted
from trainer.data.record_source import RecordSource
from trainer.data.source import Example, PictureTarget
from trainer.data.stream import Stream
from trainer.data.tasks import Task
from trainer.evaluation.drawing import voken_states
from trainer.llm.prefill_cache import Passage, PrefillCache
from trainer.llm.sequences import story_losses, story_sequence

CONTEXT = 512


def rotary():
    return add_vokens(*make_tiny_parts(context=CONTEXT), 8)


def learned():
    """Positions that are a table: there is nothing to read past its end."""
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=1, n_head=2)
    return add_vokens(tokenizer, GPT2LMHeadModel(config), 8)


@pytest.fixture(params=[rotary, learned], ids=["rotary", "learned"])
def llm(request):
    return request.param()


@pytest.fixture
def long_story(tmp_path) -> Path:
    """30 scenes of 60 letters; a letter is a token."""
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    items = [item for n in range(30) for item in ({"text": f"{n:02} ".ljust(60, "x")}, {"picture": "1.png"})]
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": items}) + "\n")
    return tmp_path / "a.jsonl"


def source_of(llm, path, task="story"):
    return RecordSource(llm, Stream(path, "jsonl"), {task: Task()}, previews_stories=True)


def test_a_story_of_thirty_scenes_is_trained_on_as_it_is_told(llm, long_story, capsys):
    source = source_of(llm, long_story)
    seen = set()
    for seed in range(12):
        for example in source.sample(2, random.Random(seed))["text"]:
            sequence = story_sequence(llm, example.turns)
            assert len(sequence.ids) <= CONTEXT
            assert len(sequence.blocks) == len(example.targets) == len(example.turns)
            assert [target.caption for target in example.targets] == [turn.text for turn in example.turns]
            numbers = [int(turn.text[:2]) for turn in example.turns]
            latest = numbers[1:]
            assert numbers[0] == 0 and latest == list(range(latest[0], latest[-1] + 1)) if latest else True
            seen |= set(numbers)
            told = fit_prompt(
                llm, [*[Turn(NEXT, f"{n:02} ".ljust(60, "x")) for n in range(numbers[-1])], Turn(NEXT)], 76
            )
            assert set(range(numbers[-1])) - set(told.dropped) <= set(numbers) | {min(latest, default=0) - 1}
    assert len(seen) > 15 and max(seen) > 25
    states, loss = story_losses(llm, [sequence])
    assert torch.isfinite(loss) and len(states) == len(sequence.blocks)
    said = capsys.readouterr().out
    assert said.count("longer than the 512 tokens that the LLM reads") == 1 and source.unused == 0
    assert len(source.previews()[0]) == 4  # the first of its scenes


@pytest.mark.parametrize("task", ["caption", "picture_from_text", "text_and_picture", "next_turn"])
def test_every_task_fits(llm, long_story, task):
    source = source_of(llm, long_story, task)
    for seed in range(6):
        for example in source.sample(2, random.Random(seed))["text"]:
            assert len(story_sequence(llm, example.turns).ids) <= CONTEXT and len(example.targets) == 1


def test_a_turn_that_fits_by_no_means_is_counted_and_in_the_end_said(llm, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"items": [{"text": "x" * 600}, {"picture": "1.png"}]}) + "\n"
    )
    source = source_of(llm, tmp_path / "a.jsonl")
    assert source.sample(3, random.Random(0)) == {"text": []} and source.unused == 3
    assert source.previews() == []
    monkeypatch.setattr("trainer.data.record_source.ENOUGH_TRIED", 4)
    with pytest.raises(BadInputError, match="4 examples in a row are longer than the 512 tokens"):
        source.sample(3, random.Random(0))


def test_a_question_stays_with_the_picture_it_is_about(llm):
    shown = torch.zeros(40, 32)
    look, question = (
        Turn("Look.", "", picture=False, image_tokens=shown),
        Turn("What?", "A fox.", picture=False),
    )
    history = [Turn("x" * 90, "", picture=False) for _ in range(5)]
    example = fitted(llm, Example([*history, look, question], []), random.Random(0))
    assert example.turns[-2:] == [look, question] and len(example.turns) < 7
    tight = Example([Turn("x" * 370, "", picture=False), look, question], [])
    assert fitted(llm, tight, random.Random(0)) is None


def test_what_reads_past_the_end_is_refused_in_training(llm):
    with pytest.raises(BadInputError, match="longer than the 512 that this LLM reads"):
        story_sequence(llm, [Turn("a", "x" * 600)])
    target = PictureTarget("a", None)
    with pytest.raises(BadInputError, match="longer than the 512 that this LLM reads"):
        PrefillCache(llm, [Passage([5] * 510, [(510, target)])])


def test_an_evaluation_reads_a_long_story_as_a_telling_does(llm):
    turns = [Turn(NEXT, "x" * 60) for _ in range(30)]
    assert voken_states(llm, turns).shape == (1, 8, 32)


@pytest.mark.parametrize("pictures", ["after_text", "when_asked", "none", "first"])
def test_a_reply_ends_with_the_context(llm, pictures):
    prompt = Prompt(llm.encode(chat_text(llm, [Turn("x" * 300)])))
    (reply,) = generate(
        llm, [prompt], Sampling(temperature=1.0, pictures=pictures, max_new_tokens=4096, stop_ids=(0,)), [0]
    )
    blocks = len(reply.voken_states)
    used = prompt.length + len(reply.ids) + 7 * blocks
    assert used <= CONTEXT and reply.stopped in ("length", "picture", "end")
    if pictures in ("after_text", "first"):
        assert blocks == 1


def test_room_for_more_than_the_llm_reads_is_no_reason_to_refuse_a_prompt(llm):
    fitted_prompt = fit_prompt(llm, [Turn("Mia.")], 4096)
    assert not fitted_prompt.dropped
    with pytest.raises(
        BadInputError, match="with 256 kept for the reply this LLM reads at most 256. Shorten the prompt"
    ):
        fit_prompt(llm, [Turn("x" * 400)], 4096)
