"""Train Voken Mapper on a real server, with tiny settings: trained, plotted, saved, drawn with; Cancel; bad input."""

import json
from pathlib import Path

import pytest
from PIL import Image

from minigpt5_core.conditioning.mapper_file import load_mapper

TRAIN = {
    "texts": "", "style": "{caption}", "name": "tiny", "steps": 12, "batch": 4, "learning_rate": 1e-3, "seed": 0,
    "scenes": 12,
}  # fmt: skip


@pytest.fixture
def training(graph):
    """training(name="..", ..): the quickstart, its mapper trained in the graph and the losses plotted."""

    def build(**changes):
        prompt = graph(scenes=1, seed=61)
        prompt["mapper"] = {
            "class_type": "MiniGPT5TrainMapper",
            "inputs": {"llm": ["adapter", 0], "clip": ["diffusion", 1], **TRAIN, **changes},
        }
        prompt["plot"] = {
            "class_type": "LossGraphNode",
            "inputs": {"loss": ["mapper", 1], "filename_prefix": "loss"},
        }
        return prompt

    return build


def files(server):
    return sorted(file.name for file in (server.base / "models" / "voken_mappers").glob("*"))


def test_a_mapper_is_trained_saved_plotted_and_drawn_with_and_not_trained_again(server, training):
    result = server.run(training(name="one"))
    assert result.status == "success", result.error
    assert "Saved as models/voken_mappers/one.safetensors" in result.outputs["mapper"]["text"][0]
    mapper, header = load_mapper(server.base / "models" / "voken_mappers" / "one.safetensors")
    assert str(header.space) == "storybook (77 x 128)"
    assert header.trained["steps"] == 12
    assert mapper.negative().tokens.shape == (1, 77, 128)
    (plot,) = result.outputs["plot"]["images"]
    with Image.open(server.base / plot["type"] / plot["filename"]) as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert any(colour == (0, 0, 255) for _, colour in colours)  # the curve
    assert result.outputs["view"]["minigpt5_pages"][0]["picture"]
    assert server.run(training(name="one")).ran == []
    assert "one_2.safetensors" not in files(server)


def test_cancel_keeps_what_was_learned_and_the_queue_goes_on(server, training):
    prompt = training(name="cancelled", steps=1000)
    asked = []

    def cancel(node, value, total):
        if total > 1000 and value > total - 1000 and not asked:
            asked.append(value)
            server.post("/interrupt", {})

    result = server.run(prompt, on_progress=cancel)
    assert result.status == "interrupted"
    _, header = load_mapper(server.base / "models" / "voken_mappers" / "cancelled.safetensors")
    assert 1 <= header.trained["steps"] < 500
    assert server.run(training(name="after")).status == "success"


def test_clip_skip_is_learned_too(server, training):
    plain, skipping = training(name="plain"), training(name="skipping")
    skipping["skip"] = {
        "class_type": "CLIPSetLastLayer",
        "inputs": {"clip": ["diffusion", 1], "stop_at_clip_layer": -2},
    }
    skipping["mapper"]["inputs"]["clip"] = ["skip", 0]
    folder = server.base / "models" / "voken_mappers"
    means = []
    for name, prompt in (("plain", plain), ("skipping", skipping)):
        result = server.run(prompt)
        assert result.status == "success", result.error
        means.append(load_mapper(folder / f"{name}.safetensors")[0].target_mean)
    assert not means[0].allclose(means[1], atol=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../x"}, "Give a plain name without a path"),
        ({"style": "watercolor"}, "without {caption}"),
        ({"texts": "nowhere.txt"}, "the name of a file, and there is none"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(server, training, changes, said):
    result = server.run(training(**changes))
    assert result.status == "refused"
    assert said in json.loads(result.error)["error"]["details"]


def test_texts_without_a_caption_are_an_error_that_says_what_to_write(server, training):
    result = server.run(training(texts="Mia wakes up. |"))
    assert result.status == "error"
    assert "hold no caption" in result.error


def test_a_mapper_of_another_family_is_refused(server, training, tmp_path):
    from minigpt5_core.conditioning import SPACES
    from minigpt5_core.conditioning.mapper import build_mapper, compact_config
    from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper

    space = SPACES["sd15"]
    folder: Path = server.base / "models" / "voken_mappers"
    mapper = build_mapper(compact_config(space, 576))
    save_mapper(folder / "sd15.safetensors", mapper, MapperHeader(space, "SmolLM2-135M-Instruct", 576, ""))
    prompt = training(name="never")
    prompt["earlier"] = {
        "class_type": "MiniGPT5LoadMapper",
        "inputs": {"mapper_name": "sd15.safetensors"},
    }
    prompt["mapper"]["inputs"]["mapper"] = ["earlier", 0]
    result = server.run(prompt)
    assert result.status == "error"
    assert "width 768 where 128 is needed" in result.error
