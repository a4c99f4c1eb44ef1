"""Files that are damaged, or made to do harm: an error in one sentence, and no crash, no hang, no traceback."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minigpt5_core.conditioning.mapper import build_mapper
from minigpt5_core.conditioning.mapper_file import MapperHeader, load_mapper, save_mapper
from minigpt5_core.conditioning.spaces import Space
from minigpt5_core.config import MapperConfig
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_llm
from minigpt5_core.reading import reading
from minigpt5_core.sizes import check_counts
from minigpt5_core.vision import ImageEncoder, ImageEncoderConfig
from minigpt5_core.vision.image_adapter import ImageAdapterHeader, load_image_adapter, save_image_adapter
from trainer.ab.answers import Answer, Answers, read_answers
from trainer.ab.study import load_study
from trainer.diffusion.text_encoders import text_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
ODD = [None, True, -1, 0, 10**6, 10**30, 1.5, "x", [], {}, [1], {"a": 1}]
DEEP = "[" * 100_000
LONG = "7" * 5_000


def edit(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_any_type_in_an_llms_config_is_read_or_refused(tiny_llm_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    whole = (folder / "config.json").read_text()
    cases = [(name, odd) for name in json.loads(whole) for odd in ODD]
    refused = 0
    for name, odd in random.Random(0).sample(cases, 60):
        (folder / "config.json").write_text(whole)
        edit(folder / "config.json", **{name: odd})
        try:
            load_llm(folder)
        except BadInputError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    "text", [DEEP, '{"model_type": "llama", "vocab_size": ' + LONG + "}", "[]", "null", "7", ""]
)
def test_any_json_for_a_config_is_refused(tiny_llm_folder, tmp_path, text):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInputError, match="llm"):
        load_llm(folder)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "depths", "text_config"])
def test_a_million_layers_are_not_built(tiny_llm_folder, tmp_path, name):
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    value = {"depths": [2, 10**6], "text_config": {"encoder_layers": 10**30}}.get(name, 10**6)
    edit(folder / "config.json", **{name: value})
    began = time.monotonic()
    with pytest.raises(BadInputError, match="at most 1,000 can be. The file is damaged: copy it again"):
        load_llm(folder)
    assert time.monotonic() - began < 5


def test_what_real_configurations_say_is_let_through():
    said = {"num_hidden_layers": 126, "vocab_size": 262_144, "block_out_channels": [320, 1280], "layers_per_block": 2,
            "max_position_embeddings": 10_485_760, "num_local_experts": 512, "block_size": 131_072,
            "transformer_layers_per_block": [[1, 2], 10], "rope": {"theta": 5e8}}  # fmt: skip
    check_counts(said, "config.json")


def test_whatever_a_library_raises_is_a_sentence(tmp_path):
    class Strange(Exception):
        """As huggingface_hub's checks of types are: of no known kind."""

    for error in (
        Strange("a"),
        ZeroDivisionError("b"),
        RecursionError("c"),
        MemoryError(),
        StopIteration(),
        KeyError("d"),
    ):
        with (
            pytest.raises(BadInputError, match="The model cannot be read: "),
            reading("The model cannot be read", tmp_path),
        ):
            raise error
    with pytest.raises(KeyboardInterrupt), reading("a", tmp_path):
        raise KeyboardInterrupt


# diffusion models


@pytest.fixture
def diffusion(tiny_diffusion_folder, tmp_path):
    return Path(shutil.copytree(tiny_diffusion_folder, tmp_path / "diffusion"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_that_lacks_tensors_or_says_what_it_cannot_be(diffusion, part):
    (weights,) = (diffusion / part).glob("*.safetensors")
    whole = load_file(weights)
    for name in list(whole)[::2]:
        del whole[name]
    save_file(whole, weights, {"format": "pt"})
    if part == "unet":  # what the libraries make up for the others is refused elsewhere
        with pytest.raises(BadInputError, match="cannot be read"):
            load_diffusion(diffusion)
    config = (diffusion / part / "config.json").read_text()
    for name in list(json.loads(config))[:12]:
        for odd in random.Random(name).sample(ODD, 2):
            (diffusion / part / "config.json").write_text(config)
            edit(diffusion / part / "config.json", **{name: odd})
            for load in (load_diffusion, lambda folder: text_pipeline(folder, "float32")):
                try:
                    load(diffusion)
                except BadInputError:
                    pass


@pytest.mark.parametrize("text", [DEEP, LONG, "[]", "{", '{"_class_name": ' + LONG + "}"])
def test_any_json_for_an_index_is_refused(diffusion, text):
    (diffusion / "model_index.json").write_text(text)
    with pytest.raises(BadInputError, match="model_index.json"):
        load_diffusion(diffusion)


# our own headers


def rewritten(file: Path, **metadata: str):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        known, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, known | metadata)


@pytest.fixture
def mapper(tmp_path):
    config = MapperConfig("compact", 3, 16, tokens=5, width=12, hidden=12, heads=2, layers=1, feed_forward=24)
    save_mapper(
        tmp_path / "a.safetensors", build_mapper(config), MapperHeader(Space("toy", 5, 12), "toy", 16, "abc")
    )
    return tmp_path / "a.safetensors", config.to_dict()


@pytest.mark.parametrize("text", [DEEP, LONG, "[]", "null", "{"])
@pytest.mark.parametrize("key", ["mapper", "space", "llm", "trained"])
def test_any_json_for_a_part_of_a_mappers_header(mapper, key, text):
    file, _ = mapper
    rewritten(file, **{f"minigpt5.{key}": text})
    with pytest.raises(BadInputError, match=r"a\.safetensors"):
        load_mapper(file)


@pytest.mark.parametrize(
    "name", ["tokens", "width", "hidden", "feed_forward", "layers", "heads", "llm_width", "vokens"]
)
@pytest.mark.parametrize("size", [10**6 + 1, 10**30])
def test_sizes_that_nothing_is_built_of(mapper, name, size):
    file, config = mapper
    rewritten(file, **{"minigpt5.mapper": json.dumps(config | {name: size})})
    began = time.monotonic()
    with pytest.raises(BadInputError):
        load_mapper(file)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["llm_width", "size", "tokens", "channels", "hidden", "layers"])
@pytest.mark.parametrize("size", [1024 * 1024, 10**30])
def test_an_image_adapter_of_sizes_that_its_tensors_do_not_have(tmp_path, name, size):
    config = ImageEncoderConfig(16, size=32, tokens=2, channels=[4], hidden=8, heads=2, layers=1)
    file = tmp_path / "image_adapter.safetensors"
    save_image_adapter(file, ImageEncoder(config), ImageAdapterHeader("toy", 16, "abc", {}))
    assert load_image_adapter(file)[0].config == config
    values = vars(config) | {name: [size] if name == "channels" else size}
    llm = {"id": "toy", "hash": "abc", "width": values["llm_width"]}
    rewritten(file, **{"minigpt5.image_encoder": json.dumps(values), "minigpt5.llm": json.dumps(llm)})
    began = time.monotonic()
    with pytest.raises(BadInputError):
        load_image_adapter(file)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text", [DEEP, LONG, "[]", "null", "{", '{"format_version": 1}', '{"format_version": ' + LONG + "}"]
)
def test_a_study_that_was_edited(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(BadInputError, match="study.json"):
        load_study(tmp_path)


def test_a_study_that_was_edited_into_any_shape(tmp_path):
    item = [{"text": "a"}]
    pair = {"name": "0001", "story": "s", "shown_left": "a", "left": item, "right": item}
    study = {"format_version": 1, "systems": {"a": "x", "b": "y"}, "seed": 0, "pairs": [pair]}
    fine = [("seed", odd) for odd in (-1, 0, 10**6, 10**30)] + [
        ("pairs", []),
        ("pairs", {}),
        ("format_version", True),
    ]
    cases = [(study | {key: odd}, (key, odd) in fine) for key in study for odd in ODD]
    sides = [(key, []) for key in ("left", "right")] + [(key, {}) for key in ("left", "right")]
    fine = [("name", "x"), ("story", "x"), *sides]
    cases += [(study | {"pairs": [pair | {key: odd}]}, (key, odd) in fine) for key in pair for odd in ODD]
    for values, is_fine in cases:
        (tmp_path / "study.json").write_text(json.dumps(values))
        if is_fine:
            assert load_study(tmp_path)
        else:
            with pytest.raises(BadInputError, match="study.json"):
                load_study(tmp_path)


def test_a_damaged_database_of_answers(tmp_path):
    answers = Answers(tmp_path)
    for number in range(400):
        answers.save(Answer(f"rater {number}", "0001", "image", "left"))
    answers.close()
    whole = (tmp_path / "answers.sqlite").read_bytes()
    damaged = [
        b"SQLite format 3\0" + bytes(100),
        b"x" * 5000,
        whole[: len(whole) // 2],
        whole[:4096] + bytes(9000),
    ]
    for content in damaged:
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "answers.sqlite").write_bytes(content)
        with pytest.raises(BadInputError, match="answers.sqlite cannot be used"):
            read_answers(tmp_path)
