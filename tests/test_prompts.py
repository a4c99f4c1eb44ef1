import pytest

from minigpt5_core.errors import BadInputError
from minigpt5_core.story.prompts import Turn, chat_text, fit_prompt


def test_a_chat_story_ends_every_reply_with_its_block(tiny_llm):
    text = chat_text(tiny_llm, [Turn("Mia.", "Mia wakes up."), Turn("And?")])
    assert "Mia wakes up.[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7]<|im_end|>" in text
    assert text.endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_a_block_in_a_prompt_is_eight_tokens(tiny_llm):
    ids = tiny_llm.encode(chat_text(tiny_llm, [Turn("Mia.", "Mia wakes up.")]))
    first = ids.index(tiny_llm.voken_ids[0])
    assert ids[first : first + 8] == tiny_llm.voken_ids


def test_an_llm_without_a_chat_template_reads_plain_lines(tiny_llm, monkeypatch):
    monkeypatch.setattr(tiny_llm.tokenizer, "chat_template", None)
    end = tiny_llm.tokenizer.eos_token
    text = chat_text(tiny_llm, [Turn("Mia.", "Mia wakes up.", picture=False), Turn("And?")])
    assert text.endswith(f"User: Mia.{end}\nAssistant: Mia wakes up.{end}\nUser: And?{end}\nAssistant: ")


def test_a_long_story_keeps_its_beginning_and_its_latest_scenes(tiny_llm):
    turns = [Turn(f"request {index}", "x" * 60) for index in range(8)] + [Turn("now")]
    fitted = fit_prompt(tiny_llm, turns, room=40)
    text = tiny_llm.tokenizer.decode(fitted.prompt.ids)
    assert fitted.dropped == tuple(range(1, 1 + len(fitted.dropped))) and fitted.dropped
    assert len(fitted.prompt.ids) <= 512 - 40
    assert "request 0" in text and "request 7" in text and "request 1" not in text


def test_an_opening_longer_than_the_context_is_refused(tiny_llm):
    with pytest.raises(BadInputError, match="Shorten the prompt"):
        fit_prompt(tiny_llm, [Turn("x" * 600)], room=40)
