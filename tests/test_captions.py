"""The cached way of stage 1 against the plain one: the same states, the same gradients."""

import torch

from minigpt5_core.generate import Prompt, Sampling, generate
from trainer.align import trainable, with_voken_rows
from trainer.captions import CaptionCache, block_states, caption_ids


def plain_states(llm, captions):
    ids = torch.tensor([caption_ids(llm, caption) + llm.voken_ids[:-1] for caption in captions])
    return llm.decoder(inputs_embeds=llm.embed(ids)).last_hidden_state[:, -len(llm.voken_ids) :]


def test_cached_captions_give_the_gradients_of_whole_forwards(tiny_llm):
    rows = trainable(with_voken_rows(tiny_llm))
    captions = ["a fox by day", "a bear by day", "a cat by night"]
    cache = CaptionCache(tiny_llm, captions, batch=2)
    gradients = []
    for way in ("cached", "plain"):
        total = 0
        for bucket in cache.buckets:
            indices = list(range(len(bucket.captions)))
            states = (
                block_states(tiny_llm, bucket, indices)
                if way == "cached"
                else plain_states(tiny_llm, bucket.captions)
            )
            total = total + (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()
        (gradient,) = torch.autograd.grad(total, rows)
        gradients.append(gradient)
    assert gradients[1].abs().max() > 0.1
    assert (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max() < 1e-5


def test_buckets_hold_every_caption_once_by_length(tiny_llm):
    captions = ["aa", "b", "c", "dd", "e"]
    cache = CaptionCache(tiny_llm, captions)
    assert [sorted(bucket.captions) for bucket in cache.buckets] == [["b", "c", "e"], ["aa", "dd"]]


def test_the_decode_loop_sees_the_states_that_were_trained(tiny_llm):
    cache = CaptionCache(tiny_llm, ["a fox by day"])
    trained = block_states(tiny_llm, cache.buckets[0], [0])
    prompt = Prompt(caption_ids(tiny_llm, "a fox by day"))
    told = generate(tiny_llm, [prompt], Sampling(max_new_tokens=1, pictures="first"), [0])[0]
    assert torch.allclose(trained[0], told.voken_states[0], atol=1e-5)
