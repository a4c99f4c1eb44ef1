import pytest
import torch

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Prompt, Sampling, StoryCache, generate
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.story.prompts import Turn, chat_text

TEXT_ONLY = Sampling(temperature=1.0, max_new_tokens=12, pictures="none")


def prompt(llm, text="Mia the fox."):
    return Prompt(llm.encode(chat_text(llm, [Turn(text)])))


def plain_hidden(llm, ids):
    return llm.causal_lm.model(torch.tensor([ids])).last_hidden_state[0]


def test_voken_states_are_those_that_predict_each_voken(tiny_llm):
    start = prompt(tiny_llm)
    reply = generate(tiny_llm, [start], Sampling(max_new_tokens=5), [3])[0]
    text = reply.ids[:-1]
    whole = plain_hidden(tiny_llm, [*start.ids, *text, *tiny_llm.voken_ids])
    first = len(start.ids) + len(text) - 1
    assert torch.allclose(reply.voken_states[0], whole[first : first + 8], atol=1e-5)


def test_a_greedy_reply_is_the_argmax_of_plain_forwards(tiny_llm):
    start = prompt(tiny_llm)
    reply = generate(tiny_llm, [start], Sampling(temperature=0, max_new_tokens=6, pictures="none"), [0])[0]
    ids = list(start.ids)
    for token in reply.ids:
        logits = tiny_llm.logits(plain_hidden(tiny_llm, ids)[-1])
        logits[tiny_llm.voken_ids] = -torch.inf
        assert token == int(logits.argmax())
        ids.append(token)


def test_cached_and_uncached_turns_give_the_same_tokens(tiny_llm):
    cache, turns = StoryCache(), []
    for seed, request in enumerate(("Mia the fox.", "What happens next?", "And then?")):
        start = Prompt(tiny_llm.encode(chat_text(tiny_llm, [*turns, Turn(request)])))
        cached = generate(tiny_llm, [start], Sampling(max_new_tokens=8), [seed], cache)[0]
        plain = generate(tiny_llm, [start], Sampling(max_new_tokens=8), [seed])[0]
        assert cached.ids == plain.ids
        assert (cached.voken_states - plain.voken_states).abs().max() < 1e-4
        turns.append(Turn(request, cached.text))


def test_the_cache_is_used_where_prompts_agree(tiny_llm):
    cache, first = StoryCache(), prompt(tiny_llm)
    generate(tiny_llm, [first], TEXT_ONLY, [0], cache)
    held = len(cache.keys)
    assert held >= len(first.ids)
    assert cache.reuse([*first.ids, -5]) == len(first.ids)


def test_several_stories_in_one_batch_get_the_tokens_they_would_get_alone(tiny_llm):
    prompts = [prompt(tiny_llm, text) for text in ("Mia the fox.", "A", "Leo the bear finds a red balloon.")]
    for pictures in ("after_text", "when_asked", "first", "none"):
        sampling = Sampling(max_new_tokens=10, pictures=pictures, max_pictures=2)
        together = generate(tiny_llm, prompts, sampling, [1, 2, 3])
        for start, seed, reply in zip(prompts, (1, 2, 3), together, strict=True):
            alone = generate(tiny_llm, [start], sampling, [seed])[0]
            assert reply.ids == alone.ids
            assert torch.allclose(reply.voken_states, alone.voken_states, atol=1e-4)


def test_text_comes_before_the_picture_or_after_it_as_asked(tiny_llm):
    block = tiny_llm.voken_ids[0]
    after = generate(tiny_llm, [prompt(tiny_llm)], Sampling(max_new_tokens=4, pictures="after_text"), [0])[0]
    first = generate(tiny_llm, [prompt(tiny_llm)], Sampling(max_new_tokens=4, pictures="first"), [0])[0]
    none = generate(tiny_llm, [prompt(tiny_llm)], TEXT_ONLY, [0])[0]
    assert after.ids[-1] == block and after.ids[0] != block and len(after.voken_states) == 1
    assert first.ids[0] == block and len(first.voken_states) == 1
    assert block not in none.ids and len(none.voken_states) == 0


def test_a_reply_may_hold_several_pictures(tiny_llm, monkeypatch):
    plain = FrozenLLM.logits
    liking = torch.zeros(len(tiny_llm.causal_lm.get_input_embeddings().weight))
    liking[tiny_llm.voken_ids[0]] = 20.0  # the model asks for pictures all the time
    monkeypatch.setattr(FrozenLLM, "logits", lambda llm, states: plain(llm, states) + liking)
    sampling = Sampling(max_new_tokens=8, pictures="when_asked", max_pictures=3)
    reply = generate(tiny_llm, [prompt(tiny_llm)], sampling, [0])[0]
    assert reply.ids.count(tiny_llm.voken_ids[0]) == len(reply.voken_states) == 3


def test_an_image_slot_is_replaced_by_its_vectors(tiny_llm):
    ids = [*tiny_llm.encode("ab"), 7, *tiny_llm.encode("c")]
    vectors = tiny_llm.embed(torch.tensor(tiny_llm.encode("xyz")))
    with_image = generate(tiny_llm, [Prompt(ids, [vectors], image_id=7)], TEXT_ONLY, [5])[0]
    as_text = generate(tiny_llm, [Prompt(tiny_llm.encode("abxyzc"))], TEXT_ONLY, [5])[0]
    assert with_image.ids == as_text.ids


def test_a_true_answer_of_the_callback_cancels_within_one_token(tiny_llm):
    seen = []
    reply = generate(
        tiny_llm, [prompt(tiny_llm)], TEXT_ONLY, [0], on_token=lambda row: seen.append(row) or len(seen) == 3
    )[0]
    assert reply.stopped == "cancelled" and len(seen) == 3 and len(reply.ids) == 3


def test_a_stop_string_ends_the_reply_and_is_cut_off(tiny_llm):
    free = generate(tiny_llm, [prompt(tiny_llm)], Sampling(max_new_tokens=12, pictures="none"), [11])[0]
    stop = free.text[2:4]
    stopped = generate(
        tiny_llm, [prompt(tiny_llm)], Sampling(max_new_tokens=12, pictures="none", stop_strings=(stop,)), [11]
    )[0]
    assert stopped.stopped == "stop string" and stopped.text == free.text.split(stop)[0].strip()


def test_seeds_of_64_bits_draw_different_replies(tiny_llm):
    replies = {
        tuple(generate(tiny_llm, [prompt(tiny_llm)], TEXT_ONLY, [seed])[0].ids)
        for seed in (1, 2**32 + 1, 2**63 - 1)
    }
    assert len(replies) == 3


def test_a_prompt_longer_than_the_context_is_refused(tiny_llm):
    with pytest.raises(BadInputError, match="at most 512"):
        generate(tiny_llm, [Prompt([5] * 600)], TEXT_ONLY, [0])


def test_stories_of_a_batch_may_end_at_different_times(tiny_llm):
    prompts = [prompt(tiny_llm, text) for text in ("Mia the fox.", "A", "Leo the bear finds a red balloon.")]
    for pictures in ("none", "after_text"):
        sampling = Sampling(
            max_new_tokens=30, pictures=pictures, stop_ids=tuple(range(60)), temperature=3.0, top_k=0
        )
        together = generate(tiny_llm, prompts, sampling, [1, 2, 3])
        assert len({len(reply.ids) for reply in together}) > 1
        for start, seed, reply in zip(prompts, (1, 2, 3), together, strict=True):
            assert reply.ids == generate(tiny_llm, [start], sampling, [seed])[0].ids
