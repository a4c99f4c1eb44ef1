import io

import pytest
import sentencepiece
import torch

from minigpt5_core.conditioning.mapper import ReferenceMapper
from minigpt5_core.config import MapperConfig
from minigpt5_core.errors import BadInputError
from minigpt5_core.published import (
    PublishedTokenizer,
    PublishedWeights,
    build_published_mapper,
    our_name,
    read_published,
)
from tests.parity import published_labels


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PublishedTokenizer:
    sentences = ["the fox walks to the lake and sits down .", "a bear reads ### in the deep forest ###Human:"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return PublishedTokenizer(file, vokens=3)


def test_the_vokens_and_the_image_s_place_come_after_the_vocabulary(tokenizer):
    assert tokenizer.voken_ids == [60, 61, 62]
    assert tokenizer.image_id == 63
    assert tokenizer.encode("[IMG0][IMG1][IMG2]<ImageHere>") == [60, 61, 62, 63]


def test_white_space_beside_an_added_token_is_dropped_and_each_piece_stands_alone(tokenizer):
    plain = tokenizer.pieces.encode
    assert tokenizer.encode("the fox [IMG0] ###") == [*plain("the fox"), 60, *plain("###")]
    assert tokenizer.encode("the fox[IMG0]###") == tokenizer.encode("the fox [IMG0] ###")
    assert tokenizer.pieces.id_to_piece(tokenizer.encode("[IMG2] ###")[1]).startswith("\u2581")


def test_the_model_s_own_special_tokens_are_one_id_and_keep_the_white_space_beside_them(tokenizer):
    plain = tokenizer.pieces.encode
    assert tokenizer.encode("fox </s>  bear") == [*plain("fox "), 2, *plain("  bear")]


def test_white_space_alone_between_added_tokens_is_nothing(tokenizer):
    assert tokenizer.encode(" [IMG0]  [IMG1] ") == [60, 61]


def test_a_file_that_is_no_sentencepiece_model_is_bad_input(tmp_path):
    for content in (None, b"not a model"):
        file = tmp_path / "tokenizer.model"
        if content:
            file.write_bytes(content)
        with pytest.raises(BadInputError, match="no sentencepiece model"):
            PublishedTokenizer(file)


def test_labels_keep_the_target_without_the_inner_vokens_of_its_first_block():
    labels = published_labels([5, 6], [7, 60, 61, 62, 63, 8, 60, 61, 62, 63], [60, 61, 62, 63])
    assert labels == [-100, -100, 7, 60, -100, -100, 63, 8, 60, 61, 62, 63]


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("fc.2.bias", ("mapper", "fc.2.bias")),
        ("t2i_decoder_prompt", ("mapper", "queries")),
        ("llm_to_t2i_mapping.encoder.norm.weight", ("mapper", "transformer.encoder.norm.weight")),
        ("model.llama_model.lm_head.weight", ("llm", "lm_head.weight")),
        (
            "model.llama_model.base_model.model.model.embed_tokens.modules_to_save.default.weight",
            ("llm", "model.embed_tokens.weight"),
        ),
        (
            "model.llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
            ("llm", "model.layers.0.self_attn.q_proj.lora_A.default.weight"),
        ),
    ],
)
def test_published_names_become_ours(published, ours):
    assert our_name(published) == ours


def test_an_unknown_tensor_is_bad_input():
    with pytest.raises(BadInputError, match=r"'unet.weight'.*Known beginnings: model.llama_model"):
        read_published({"unet.weight": torch.zeros(1)})


def test_stage_two_lies_over_stage_one():
    first = read_published({"fc.0.bias": torch.zeros(1), "model.llama_model.lm_head.weight": torch.zeros(1)})
    name = "model.llama_model.base_model.model.lm_head.modules_to_save.default.weight"
    merged = read_published({name: torch.ones(1)}).over(first)
    assert merged.llm["lm_head.weight"].item() == 1
    assert merged.mapper["fc.0.bias"].item() == 0


def toy_mapper() -> ReferenceMapper:
    torch.manual_seed(0)
    sizes = {"tokens": 5, "width": 8, "hidden": 8, "heads": 2, "layers": 3, "feed_forward": 20}
    return ReferenceMapper(MapperConfig(kind="reference", vokens=3, llm_width=16, **sizes))


def test_the_mapper_s_sizes_are_read_off_its_tensors():
    mapper = toy_mapper()
    built = build_published_mapper(PublishedWeights(mapper.state_dict(), {}), heads=2, vokens=3)
    assert built.config == mapper.config
    states = torch.randn(1, 3, 16)
    assert torch.allclose(built(states).tokens, mapper(states).tokens, atol=1e-6)


def test_a_stage_two_checkpoint_alone_is_bad_input_that_asks_for_both():
    weights = {
        name: tensor for name, tensor in toy_mapper().state_dict().items() if name.startswith("transformer")
    }
    with pytest.raises(BadInputError, match="lacks the mapper's fc.0.weight, queries.*give both"):
        build_published_mapper(PublishedWeights(weights, {}))


@pytest.mark.parametrize("change", [{"fc.0.bias": None}, {"fc.9.bias": torch.zeros(1)}])
def test_a_mapper_with_a_tensor_missing_or_too_many_is_bad_input(change):
    weights = toy_mapper().state_dict() | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(BadInputError, match=next(iter(change))):
        build_published_mapper(PublishedWeights(weights, {}), heads=2, vokens=3)
