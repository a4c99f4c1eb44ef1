"""The storybook as a user gets it: real weights, the real command, and no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from minigpt5_core.llm.files import default_llm
from minigpt5_core.pipeline import STORYBOOK

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

NO_NETWORK = """
import socket
def refuse(*arguments, **keywords):
    raise AssertionError("something reached for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def run(module, *arguments, home):
    """The command in a process where every connection fails."""
    (home / "sitecustomize.py").write_text(NO_NETWORK)
    default_llm()  # made once, outside: unpacking it is not what is tested here
    return subprocess.run(
        [sys.executable, "-c", f"exec(open({str(home / 'sitecustomize.py')!r}).read()); import runpy, sys; "
         f"sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__')", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    home = tmp_path_factory.mktemp("story")
    told = run("minigpt5_core", "Leo the bear finds a red balloon on the beach.", "--scenes", "3", "--seed", "5",
               "--out", str(home / "out"), home=home)  # fmt: skip
    assert told.returncode == 0, told.stderr
    return home, told


def test_a_story_is_told_without_a_network(story):
    home, told = story
    saved = json.loads((home / "out" / "story.json").read_text())
    assert [scene["picture"] for scene in saved["scenes"]] == ["scene_01.png", "scene_02.png", "scene_03.png"]
    assert all(scene["text"] for scene in saved["scenes"])
    assert Image.open(home / "out" / "scene_01.png").size == (128, 128)
    assert told.stdout.splitlines()[-1].endswith("story.html")
    assert "cannot draw" not in told.stdout


def test_the_same_prompt_and_seed_give_the_same_files(story):
    home, _ = story
    again = run("minigpt5_core", "Leo the bear finds a red balloon on the beach.", "--scenes", "3", "--seed", "5",
                "--out", str(home / "again"), home=home)  # fmt: skip
    assert again.returncode == 0, again.stderr
    files = sorted(path.name for path in (home / "out").iterdir())
    assert files == sorted(path.name for path in (home / "again").iterdir())
    for name in files:
        assert (home / "out" / name).read_bytes() == (home / "again" / name).read_bytes(), name


def test_words_it_cannot_draw_are_told_and_a_story_goes_on(story):
    home, _ = story
    told = run(
        "minigpt5_core",
        "A dragon flies a spaceship.",
        "--scenes",
        "1",
        "--out",
        str(home / "dragon"),
        home=home,
    )
    assert told.returncode == 0 and "dragon" in told.stdout.splitlines()[0]
    more = run("minigpt5_core", "--continue", str(home / "dragon" / "story.json"), "--scenes", "1", home=home)
    assert more.returncode == 0, more.stderr
    assert len(json.loads((home / "dragon" / "story.json").read_text())["scenes"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "The prompt is empty"),
        (["x", "--scenes", "0"], "--scenes is 0"),
        (["x" * 60000], "Shorten the prompt"),
        (["x", "--out", "README.md/story"], "README.md"),
        (["x", "--mapper", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_input_is_a_message_and_code_2(arguments, message, tmp_path):
    told = run(
        "minigpt5_core",
        *arguments,
        *(() if "--out" in arguments else ("--out", str(tmp_path / "out"))),
        home=tmp_path,
    )
    assert told.returncode == 2 and message in told.stderr and "Traceback" not in told.stderr


def test_a_truncated_mapper_is_named(tmp_path):
    whole = (STORYBOOK / "voken_mappers" / "storybook.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    told = run(
        "minigpt5_core",
        "x",
        "--mapper",
        str(tmp_path / "cut.safetensors"),
        "--out",
        str(tmp_path / "out"),
        home=tmp_path,
    )
    assert told.returncode == 2 and "cut.safetensors is not a whole safetensors file" in told.stderr


@pytest.mark.trains
def test_the_smoke_recipes_make_parts_that_tell_a_story(tmp_path):
    for stage, options in (("align", []), ("finetune", ["--from", str(tmp_path / "align")])):
        done = run("trainer", stage, "--recipe", f"trainer/recipes/smoke_{stage}.toml", *options,
                   "--out", str(tmp_path / stage), home=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
    parts = [
        "--mapper",
        str(tmp_path / "finetune/mapper.safetensors"),
        "--adapter",
        str(tmp_path / "finetune/adapter"),
    ]
    told = run(
        "minigpt5_core",
        "Mia the fox.",
        *parts,
        "--scenes",
        "1",
        "--out",
        str(tmp_path / "out"),
        home=tmp_path,
    )
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "out" / "scene_01.png").is_file()


def test_the_text_encoder_is_read_whole_by_transformers_4_and_5_alike():
    folder = STORYBOOK / "diffusers"
    encoder, about = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")("Mia the fox", return_tensors="pt").input_ids
    assert ids.tolist() == [[0, 612, 327, 522, 1]]
    states = encoder.float().eval()(ids).last_hidden_state
    assert states.abs().sum().item() == pytest.approx(436.0588, rel=1e-4)  # as computed by either


def test_the_bundle_stays_small():
    files = [path for path in STORYBOOK.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert sum(path.stat().st_size for path in files) <= 60 * 2**20


def test_the_trainable_set_stays_within_6_6_million_parameters():
    mapper = load_file(STORYBOOK / "voken_mappers" / "storybook.safetensors")
    adapter = load_file(STORYBOOK / "loras" / "storybook" / "adapter_model.safetensors")
    parameters = sum(tensor.numel() for tensors in (mapper, adapter) for tensor in tensors.values())
    assert parameters <= 6_600_000
    assert all(torch.isfinite(tensor).all() for tensors in (mapper, adapter) for tensor in tensors.values())
