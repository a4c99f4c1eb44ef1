"""Real classes at toy size: a two-layer LLaMA with a byte-level tokenizer and a chat template."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt5_core.llm import FrozenLLM, add_vokens

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_parts(seed: int = 0, context: int = 512) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A LLaMA 32 wide with random weights large enough that its choices differ from token to token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(seed)
    return fast, LlamaForCausalLM(config)


@pytest.fixture
def tiny_llm() -> FrozenLLM:
    return add_vokens(*make_tiny_parts(), 8)


@pytest.fixture(scope="session")
def tiny_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    for part in make_tiny_parts():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image model of the storybook's classes, made by its trainer in two steps."""
    from trainer.storybook.autoencoder import AutoencoderRecipe
    from trainer.storybook.diffusion import (
        DiffusionRecipe,
        StorybookDiffusionRecipe,
        train_storybook_diffusion,
    )

    folder = tmp_path_factory.mktemp("diffusion") / "tiny"
    recipe = StorybookDiffusionRecipe(
        AutoencoderRecipe(steps=2, batch=2),
        DiffusionRecipe(scenes=8, steps=2, batch=2, block_out_channels=(32, 32), text_layers=1),
    )
    train_storybook_diffusion(recipe, folder)
    return folder
