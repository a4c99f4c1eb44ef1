"""Language models as people have them: how their templates word a conversation, and what ends a reply."""

import json
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Prompt, Sampling, generate
from minigpt5_core.llm import FrozenLLM, add_vokens, load_llm
from minigpt5_core.llm.bounded import bounded
from minigpt5_core.story.prompts import SYSTEM, Turn, chat_prompt, chat_text
from tests.conftest import make_tiny_parts, make_tiny_tokenizer
from trainer.llm.sequences import story_losses, story_sequence
from trainer.worlds.form import Subject, request_text

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # the parts of it that word one reply in two ways
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
QWEN3_OLD = QWEN3.partition("{% if enable_thinking")[0] + "{% endif %}"  # it knows nothing of the setting
LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|start|>system\n\nToday Date: ' + date_string + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot|>' }}{% for message in messages %}{{ '<|start|>' + message['role'] + '\n\n' }}"
    "{{ message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
GLM = (  # a reply ends where the next one's name begins, which is in generation_config.json
    "[gMASK]{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') }}"
    "{{ message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
END_OF_ALL = NO_END + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
IGNORES_SYSTEM = TOLD = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>",
           "<|system|>", "<|start|>", "<|eot|>", "<eos>")  # fmt: skip
# template, eos token, the mark that ends a reply
WORDINGS = {
    "gemma": (GEMMA, "<eos>", "<end_of_turn>"),
    "phi": (PHI, "<eos>", "<|end|>"),
    "qwen3": (QWEN3, "<|im_end|>", "<|im_end|>"),
    "qwen3 without the setting": (QWEN3_OLD, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot|>", "<|eot|>"),
    "llama3 whose eos is another": (LLAMA3, "<eos>", "<|eot|>"),
    "glm": (GLM, "<eos>", "<|user|>"),
    "llama2": (LLAMA2, "<eos>", "<eos>"),
    "no end mark": (NO_END, "<eos>", "<eos>"),
    "one end mark for all": (END_OF_ALL, "<eos>", "<eos>"),
    "system left out": (IGNORES_SYSTEM, "<|im_end|>", "<|im_end|>"),
    "none": (None, "<eos>", "<eos>"),
}
TURNS = [Turn("Mia the fox.", "Mia wakes."), Turn("Next?", "She runs."), Turn("And?", "", picture=True)]


def special_tokenizer(template, eos):
    tokenizer = make_tiny_tokenizer(SPECIAL)
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template = eos, "<bos>", template
    return tokenizer


def llm_of(name, model=None) -> FrozenLLM:
    template, eos, mark = WORDINGS[name]
    tokenizer = special_tokenizer(template, eos)
    if model is None:
        _, model = make_tiny_parts()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(one) for one in (eos, "<|user|>")]
    if name != "glm":
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return add_vokens(tokenizer, model, 8)


@pytest.fixture(params=WORDINGS)
def name(request):
    return request.param


def taught(llm, turns):
    labels = story_sequence(llm, turns).labels
    return [label for label in labels if label != -100]


def test_a_reply_is_taught_with_the_mark_that_ends_it_and_nothing_else(name):
    llm, mark = llm_of(name), WORDINGS[name][2]
    assert llm.chat.end == llm.tokenizer.convert_tokens_to_ids(mark)
    said = llm.tokenizer.decode(taught(llm, TURNS)).replace("[IMG0] ", "[IMG0]")
    parts = [part.strip() for part in said.split(mark)]
    assert parts == ["Mia wakes.[IMG0]", "She runs.[IMG0]", "[IMG0]", ""]


def test_what_is_trained_on_reads_like_what_is_told(name):
    """Every reply of a story stands behind the very prompt that it would be told behind."""
    llm = llm_of(name)
    whole = chat_text(llm, TURNS)
    for index, turn in enumerate(TURNS):
        told = chat_text(llm, [*TURNS[:index], Turn(turn.request)])
        assert whole.startswith(told)
        assert whole[len(told) :].lstrip().startswith(turn.text or "[IMG0]")
    assert (
        whole.index(SYSTEM) < whole.index("Mia the fox.") < whole.index("Mia wakes.") < whole.index("Next?")
    )
    assert whole.count(SYSTEM) == 1


def test_training_and_telling_have_the_same_voken_states(name):
    llm = llm_of(name)
    states, loss = story_losses(llm, [story_sequence(llm, TURNS)])
    assert torch.isfinite(loss)
    told = chat_prompt(llm, [*TURNS[:2], Turn("And?")])
    gap = len(story_sequence(llm, TURNS).ids[: story_sequence(llm, TURNS).blocks[2]]) - told.length
    (reply,) = generate(llm, [told], Sampling(max_new_tokens=1, pictures="first"), [0])
    if (
        gap == 0
    ):  # else the template writes a blank between its prompt and the reply, which the LLM learns to write
        assert torch.allclose(states[2], reply.voken_states[0], atol=1e-4)
    else:
        assert name in ("no end mark", "one end mark for all", "llama2") and gap == 1


def test_a_prompt_is_the_same_on_every_day(monkeypatch):
    assert "Today Date: 26 Jul 2024" in chat_text(llm_of("llama3"), TURNS)


def test_no_thoughts_are_asked_for():
    told = chat_text(llm_of("qwen3"), [*TURNS, Turn("On?")])
    assert told.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and told.count("<think>") == 4
    assert "<think>" not in chat_text(llm_of("qwen3 without the setting"), [*TURNS, Turn("On?")])


def test_a_system_message_that_a_template_does_not_take_opens_the_first_request():
    for name in ("gemma", "system left out"):
        assert f"user\n{SYSTEM}\n\nMia the fox." in chat_text(llm_of(name), TURNS)


@pytest.mark.parametrize("begins", [True, False])
def test_an_llm_without_a_template_that_begins_texts_with_bos_reads_one(begins):
    llm = llm_of("none")
    if begins:
        bos = llm.tokenizer.bos_token_id
        llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", bos)]
        )
    text = chat_text(llm, [Turn("Mia.")])
    assert text == ("<bos>" if begins else "") + f"System: {SYSTEM}<eos>\nUser: Mia.<eos>\nAssistant: "


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        (Gemma2ForCausalLM, Gemma2Config, "gemma"),
        (Phi3ForCausalLM, Phi3Config, "phi"),
        (Qwen3ForCausalLM, Qwen3Config, "qwen3"),
    ],
    ids=["gemma2", "phi3", "qwen3"],
)  # fmt: skip
def test_real_classes_are_trained_and_tell(tmp_path, kind, config, name):
    template, eos, mark = WORDINGS[name]
    tokenizer = special_tokenizer(template, eos)
    torch.manual_seed(0)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(mark)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
             "vocab_size": len(tokenizer)}  # fmt: skip
    model = kind(config(**sizes, eos_token_id=ends, bos_token_id=tokenizer.bos_token_id, pad_token_id=0))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path)
    llm = load_llm(tmp_path)
    assert llm.stop_ids == {*ends, llm.chat.end} and llm.chat.end == ends[1]
    assert torch.isfinite(story_losses(llm, [story_sequence(llm, TURNS)])[1])
    (reply,) = generate(llm, [chat_prompt(llm, [*TURNS, Turn("On?")])], Sampling(max_new_tokens=6), [0])
    assert len(reply.voken_states) == 1


# several end marks


def saying(llm, ids):
    """The LLM made to say these ids one after another."""
    said = iter(ids)

    def logits(states):
        answer = torch.full((len(states), llm.causal_lm.get_output_embeddings().weight.shape[0]), -50.0)
        answer[:, next(said)] = 50.0
        return answer

    class Saying(FrozenLLM):
        pass

    told = Saying(**{name: getattr(llm, name) for name in llm.__dataclass_fields__})
    object.__setattr__(told, "logits", logits)
    return told


@pytest.mark.parametrize("mark", ["<eos>", "<|eot|>", "<|end|>"])
def test_a_reply_ends_at_any_of_the_end_marks(mark):
    llm = llm_of("llama3 whose eos is another")
    known = llm.tokenizer.convert_tokens_to_ids(["<|end|>", "<|eot|>"])
    llm.causal_lm.generation_config.eos_token_id = [
        *known,
        5,
        10**6,
    ]  # 5 is a letter, the last is none of its ids
    assert llm.stop_ids == {*known, llm.tokenizer.eos_token_id}
    words = llm.encode("Hello")
    told = saying(llm, [*words, llm.tokenizer.convert_tokens_to_ids(mark), *llm.encode("<|user|>on and on")])
    (reply,) = generate(told, [chat_prompt(llm, [Turn("Hi")])], Sampling(temperature=0, pictures="none"), [0])
    assert (reply.text, reply.stopped) == ("Hello", "end")


def test_generation_config_of_the_folder_counts(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    start, end = load_llm(folder).tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, start]}))
    assert load_llm(folder).stop_ids == {start, end}


# templates that cannot be used


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for", "fails"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages[7]['role'] }}{{ raise_exception('Only for tools.') }}", "fails: "),
        ("{{ raise_exception('Only for tools') }}", "fails: Only for tools"),
        ("{{ 'a' + 1 }}", "fails"),
        ("{{ messages.nothing.of.that }}", "fails"),
        ("always the same", "leaves out what is said, or moves it: 'always the same'"),
        ("{{ messages[-1]['content'] }}", "leaves out what is said"),
        (
            "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}",
            "leaves out what is said",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_the_llm_is_loaded(
    tiny_llm_folder, tmp_path, template, why
):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(
        BadInputError, match=f"The LLM's chat template {why}.*Take the tokenizer's files from where"
    ):
        load_llm(folder)


LOOPS = "{% for a in range(90000) %}" * 3 + "{% set b = 1 %}" + "{% endfor %}" * 3


def test_a_template_without_an_end_is_ended(tiny_llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("minigpt5_core.llm.chat.bounded", lambda: bounded(0.2))
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    (folder / "chat_template.jinja").write_text(LOOPS)
    began, before = time.monotonic(), sys.gettrace()
    with pytest.raises(BadInputError, match="does not end within 0.2 seconds"):
        load_llm(folder)
    assert time.monotonic() - began < 20 and sys.gettrace() is before


def test_a_tokenizer_by_which_no_reply_would_end_is_refused():
    llm = llm_of("no end mark")
    llm.tokenizer.eos_token = None
    with pytest.raises(BadInputError, match="no reply would ever end"):
        chat_text(replace(llm, chats={}), TURNS)


def test_stories_are_asked_of_an_llm_in_its_own_wording():
    subject = Subject("a fox", "a key", "a forest")
    for name in WORDINGS:
        text = request_text(llm_of(name), subject, 2)
        assert SYSTEM not in text and "xq" not in text and text.count("a fox") >= 1


def test_the_order_of_turns_does_not_change_a_wording(tiny_llm):
    """The bundled LLM's template is used as it is: what was trained on it goes on reading the same."""
    assert tiny_llm.chat.pieces is None and tiny_llm.chat.reply_end == "" and tiny_llm.chat.takes_system
    random.Random(0).shuffle(turns := list(TURNS))
    rendered = tiny_llm.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, *(message for turn in turns for message in (
            {"role": "user", "content": turn.request},
            {"role": "assistant", "content": turn.text + "".join(f"[IMG{n}]" for n in range(8))}))],
        tokenize=False,
    )  # fmt: skip
    assert chat_text(tiny_llm, turns) == rendered
    assert Prompt(tiny_llm.encode(rendered)).ids == chat_prompt(tiny_llm, turns).ids
