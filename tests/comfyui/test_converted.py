"""Published files at toy size, converted, and a story told with them in a real ComfyUI, beside the same in Python."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt5_core.pipeline import Parts, load
from minigpt5_core.story import Story
from minigpt5_core.story.presets import PRESETS
from trainer.cli import main

HERE = Path(__file__).parent
OPENING = "Mia the fox walks in the snow."


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """minigpt4/ and vist/, as the two commands of docs/models.md write them."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import published_files as files

    folder = tmp_path_factory.mktemp("converted")
    sizes = files.Sizes()
    files.write_published(folder, sizes)
    names = {
        "vicuna": "vicuna",
        "vit": "eva_vit_g.pth",
        "qformer": "qformer.pth",
        "projection": "projection.pth",
    }
    given = [word for flag, name in names.items() for word in (f"--{flag}", str(folder / name))]
    heads = ["--vit-heads", str(sizes.vit_heads), "--qformer-heads", str(sizes.qformer_heads)]
    assert main(["convert", "minigpt4", *given, *heads, "--out", str(folder / "minigpt4")]) == 0
    stages = ["--stage1", str(folder / "stage1.ckpt"), "--stage2", str(folder / "stage2.ckpt"), "--bos", "2"]
    llm = ["--llm", str(folder / "minigpt4")]
    assert main(["convert", "minigpt5", *stages, *llm, "--out", str(folder / "vist")]) == 0
    return folder


@pytest.fixture(scope="module")
def host(request, converted, tmp_path_factory):
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    base = conftest.make_base(tmp_path_factory.mktemp("comfyui") / "base")
    models = base / "models"
    shutil.copytree(converted / "minigpt4", models / "LLM" / "minigpt4")
    shutil.copytree(converted / "vist" / "adapter", models / "loras" / "vist")
    (models / "voken_mappers").mkdir()
    shutil.copy(converted / "vist" / "mapper.safetensors", models / "voken_mappers" / "vist.safetensors")
    server = conftest.Server(base)
    yield server
    server.stop()


def tell(host, graph, preset, seed):
    """The texts of two scenes, as they were saved."""
    values = graph(OPENING, instructions="", seed=seed)
    values["interleaver"]["inputs"]["preset"] = preset
    values["llm"]["inputs"] |= {"llm_name": "minigpt4", "dtype": "float32"}
    values["adapter"]["inputs"]["adapter_name"] = "vist"
    values["mapper"]["inputs"]["mapper_name"] = "vist.safetensors"
    result = host.run(values)
    assert result.status == "success", result.error
    newest = max((host.base / "output").rglob("story.json"), key=lambda file: file.stat().st_mtime)
    scenes = json.loads(newest.read_text(encoding="utf-8"))["scenes"]
    assert len(scenes) == 2 and all((newest.parent / scene["picture"]).is_file() for scene in scenes)
    return [scene["text"] for scene in scenes]


@pytest.mark.parametrize("preset", ["default", "published_vist", "published_mmdialog"])
def test_a_converted_checkpoint_tells_in_comfyui_what_it_tells_in_python(host, graph, converted, preset):
    told = tell(host, graph, preset, 5)
    parts = Parts(
        converted / "minigpt4", converted / "vist" / "adapter", converted / "vist" / "mapper.safetensors"
    )
    always = replace(
        PRESETS[preset].sampling, pictures="after_text", max_pictures=1
    )  # as the Interleaver asks
    scenes = load(parts).tell(
        Story(OPENING, 5), 2, steps=4, guidance=3.0, preset=replace(PRESETS[preset], sampling=always)
    )
    assert told[0] == next(scenes).text
    if preset != "published_mmdialog":
        assert told[0] == OPENING  # the first scene is the opening, drawn
    assert told[1] != told[0]
