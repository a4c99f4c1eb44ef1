import torch

from minigpt5_core.generate import Prompt, Sampling, generate
from minigpt5_core.story.prompts import Turn, chat_text
from trainer.llm.sequences import story_losses, story_sequence
from trainer.stages.finetune import FinetuneModel, with_lora

TURNS = [Turn("Mia.", "Mia wakes."), Turn("Next?", "She runs.")]


def test_a_story_teaches_replies_the_first_voken_and_the_end_but_nothing_else(tiny_llm):
    sequence = story_sequence(tiny_llm, TURNS)
    taught = [token for token in sequence.labels if token != -100]
    expected = []
    for turn in TURNS:
        expected += [*tiny_llm.encode(turn.text), tiny_llm.voken_ids[0], tiny_llm.tokenizer.eos_token_id]
    assert taught == expected
    assert len(sequence.blocks) == 2


def test_a_packed_story_gives_the_states_and_the_loss_of_separate_forwards(tiny_llm):
    sequences = [story_sequence(tiny_llm, TURNS), story_sequence(tiny_llm, [Turn("A.", "B.")])]
    states, loss = story_losses(tiny_llm, sequences)
    assert states.shape == (3, 8, 32)
    negative_log_likelihoods = []
    for sequence in sequences:
        logits = tiny_llm.causal_lm(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(sequence.labels):
            if label != -100:
                negative_log_likelihoods.append(-logits[position - 1, label])
    assert torch.allclose(loss, torch.stack(negative_log_likelihoods).mean(), atol=1e-5)


def test_training_and_telling_see_the_same_voken_states(tiny_llm):
    states, _ = story_losses(tiny_llm, [story_sequence(tiny_llm, TURNS)])
    told = Prompt(
        tiny_llm.encode(chat_text(tiny_llm, [TURNS[0], Turn("Next?")])) + tiny_llm.encode("She runs.")
    )
    reply = generate(tiny_llm, [told], Sampling(max_new_tokens=1, pictures="first"), [0])[0]
    assert torch.allclose(states[1], reply.voken_states[0], atol=1e-4)


def test_lora_trains_the_voken_rows_and_two_projections_only(tiny_llm):
    _, adapted = with_lora(tiny_llm, FinetuneModel())
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    lora = [name for name in trained if "lora_" in name]
    assert len(lora) == 2 * 2 * 2  # layers, projections, A and B
    assert all("self_attn.q_proj" in name or "self_attn.v_proj" in name for name in lora)
    assert [tuple(trained[name].shape) for name in trained if name not in lora] == [(8, 32)]
