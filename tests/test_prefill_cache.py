"""The cached way of stage 1 against the plain one: the same states, the same gradients."""

import random
from itertools import islice

import torch

from minigpt5_core.generate import Prompt, Sampling, generate
from minigpt5_core.story.prompts import Turn, chat_text
from trainer.llm.adapters import trainable, with_voken_rows
from trainer.llm.prefill_cache import PrefillCache, block_states, caption_ids
from trainer.storybook.world.source import caption_passage, story_passage
from trainer.storybook.world.state import State
from trainer.storybook.world.stories import stories

CAPTIONED = [
    State("fox", "beach", "day"),
    State("bear", "snow", "night", "cake"),
    State("cat", "city", "day"),
]


def plain_states(llm, contexts):
    """One whole forward for each context's ids and its voken block."""
    blocks = []
    for ids in contexts:
        whole = torch.tensor([[*ids, *llm.voken_ids[:-1]]])
        hidden = llm.decoder(inputs_embeds=llm.embed(whole)).last_hidden_state
        blocks.append(hidden[:, -len(llm.voken_ids) :])
    return torch.cat(blocks)


def gradient(states, rows):
    total = (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()
    return torch.autograd.grad(total, rows)[0]


def test_cached_captions_give_the_gradients_of_whole_forwards(tiny_llm):
    rows = trainable(with_voken_rows(tiny_llm)[1])
    cache = PrefillCache(tiny_llm, [caption_passage(tiny_llm, state) for state in CAPTIONED], batch=2)
    cached = block_states(tiny_llm, cache.contexts)
    plain = plain_states(tiny_llm, [caption_ids(tiny_llm, c.target.caption) for c in cache.contexts])
    assert torch.allclose(cached, plain, atol=1e-5)
    expected = gradient(plain, rows)
    assert expected.abs().max() > 0.1
    assert (gradient(cached, rows) - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_storys_pictures_stand_behind_its_texts_so_far(tiny_llm):
    story = next(stories(3))[:2]
    passage = story_passage(tiny_llm, story)
    assert [target.caption for _, target in passage.pictures] == [scene.caption for scene in story]
    for index, (length, _) in enumerate(passage.pictures):
        turns = [Turn(scene.request, scene.text, picture=False) for scene in story[:index]]
        open_turn = chat_text(tiny_llm, [*turns, Turn(story[index].request)]) + story[index].text
        assert passage.ids[:length] == tiny_llm.encode(open_turn)


def test_cached_stories_give_the_states_of_whole_forwards(tiny_llm):
    passage = story_passage(tiny_llm, next(stories(3))[:2])
    cache = PrefillCache(tiny_llm, [passage])
    with torch.no_grad():
        plain = plain_states(tiny_llm, [passage.ids[: context.length] for context in cache.contexts])
        assert torch.allclose(block_states(tiny_llm, cache.contexts), plain, atol=1e-5)


def test_half_precision_in_the_cache_costs_little(tiny_llm):
    passages = [caption_passage(tiny_llm, state) for state in CAPTIONED]
    with torch.no_grad():
        whole, half = (
            block_states(tiny_llm, PrefillCache(tiny_llm, passages, dtype=dtype).contexts)
            for dtype in (torch.float32, torch.float16)
        )
    assert 0 < (whole - half).abs().max() < 0.01 * whole.abs().max()


def test_a_batch_is_drawn_from_neighbours_in_length_and_every_context_comes(tiny_llm):
    states = [scene.state for story in islice(stories(5), 8) for scene in story]
    cache = PrefillCache(tiny_llm, [caption_passage(tiny_llm, state) for state in states])
    chance, seen = random.Random(0), set()
    place = {id(context): index for index, context in enumerate(cache.contexts)}
    for _ in range(300):
        drawn = [place[id(context)] for context in cache.sample(2, chance)]
        assert max(drawn) - min(drawn) < 8
        seen |= set(drawn)
    assert seen == set(range(len(states)))


def test_the_decode_loop_sees_the_states_that_were_trained(tiny_llm):
    cache = PrefillCache(tiny_llm, [caption_passage(tiny_llm, CAPTIONED[0])])
    trained = block_states(tiny_llm, cache.contexts)
    prompt = Prompt(caption_ids(tiny_llm, CAPTIONED[0].caption()))
    told = generate(tiny_llm, [prompt], Sampling(max_new_tokens=1, pictures="first"), [0])[0]
    assert torch.allclose(trained[0], told.voken_states[0], atol=1e-5)
