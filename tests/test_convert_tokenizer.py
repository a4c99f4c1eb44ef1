"""The fast tokenizer's ids, beside those of the published slow one."""

import random
import tarfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import add_vokens
from minigpt5_core.published import PublishedTokenizer
from minigpt5_core.vokens import PICTURE, voken_strings
from tests import published_files as files
from trainer.convert.tokenizer import fast_tokenizer

ROOT = Path(__file__).parents[1]
PIECES = [
    "the fox ", " walks", "###", "###Human:", " ### ", "[IMG0]", "[IMG1]", "[IMG7]", "<ImageHere>", "<Img>", "</Img>",
    "  ", "\n", "\t", "Ünïcödé ", "日本", "😀", "</s>", "<s>", "<unk>", "a", "?!", " .", "They sail across the water",
    "1234", "\u3000", "ＦＯＸ", "\u00a0", "#", "##", "####", "forest", "READS", "deep in", "[IMG", "[IMG9]",
]  # fmt: skip


@pytest.fixture(scope="module", params=["as LLaMA's", "with a piece of its own, normalised"])
def file(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "as LLaMA's":
        files.write_tokenizer(folder / "tokenizer.model", 340)
        return folder / "tokenizer.model"
    with tarfile.open(ROOT / "tests/fixtures/parity.tar.xz") as archive:
        [member] = [member for member in archive if member.name.endswith("llama/tokenizer.model")]
        archive.extract(member, folder, filter="data")
    return folder / member.name


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 9))) for _ in range(count)]


def test_thousands_of_texts_have_the_published_ids(file, tmp_path):
    published = PublishedTokenizer(file)
    fast_tokenizer(file, 8, 2048).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    add_vokens(loaded, LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **sizes)), 8)
    for text in texts(3000):
        assert loaded(text, add_special_tokens=False).input_ids == published.encode(text), repr(text)
    assert loaded.convert_tokens_to_ids(voken_strings(8)) == published.voken_ids
    assert loaded.convert_tokens_to_ids(PICTURE) == published.image_id + 1
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.model_max_length) == (1, 2, 2048)


def test_words_are_read_back(file):
    tokenizer = fast_tokenizer(file, 8, 2048)
    ids = tokenizer("the fox reads 日[IMG0]", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the fox reads 日"


def test_a_file_that_is_no_model_of_its_kind_is_bad_input(tmp_path):
    file = tmp_path / "tokenizer.model"
    for content in (b"not a model", b""):
        file.write_bytes(content)
        with pytest.raises(BadInputError, match="tokenizer.model"):
            fast_tokenizer(file, 8, 2048)
