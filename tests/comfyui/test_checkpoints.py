"""The nodes with random checkpoints as large as SD 1.5, SD 2.1 and SDXL, through ComfyUI's own loader and sampler."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.chromium import needs_chromium

HERE = Path(__file__).parent
STORYBOOK = HERE.parents[1] / "storybook"
SCREENSHOTS = HERE.parents[1] / ".screenshots"
TEMPLATE = "Your checkpoint tells the story"
WORKFLOW = "Any SD 1.5 or SDXL checkpoint with a mapper"
GIGA = 1e9
# Without --fp16-unet ComfyUI widens a UNet to float32 on a CPU: 10 GB for SDXL's. Its text encoders stay as they are.
FLAGS = {"sd15": (), "sd21": (), "sdxl": ("--fp16-unet",)}
MEMORY, DISK = {"sd15": 7, "sd21": 8, "sdxl": 12}, {"sd15": 3, "sd21": 4, "sdxl": 8}  # gigabytes
SPACES = {
    "sd15": "sd15 (77 x 768)",
    "sd21": "sd21 (77 x 1024)",
    "sdxl": "sdxl (77 x 2048 with a pooled vector of 1280)",
    "storybook": "storybook (77 x 128)",
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("sd15", marks=[pytest.mark.slow, pytest.mark.space("sd15", "ComfyUI")]),
        pytest.param("sd21", marks=[pytest.mark.slow, pytest.mark.space("sd21", "ComfyUI")]),
        pytest.param("sdxl", marks=[pytest.mark.comfyui_sdxl, pytest.mark.space("sdxl", "ComfyUI")]),
    ],
)
def loaded(request, tmp_path_factory):
    """(kind, a server whose models folder holds KIND.safetensors and mappers); the big file goes again."""
    from minigpt5_core.llm.files import default_llm

    kind, folder = request.param, tmp_path_factory.mktemp("checkpoint")
    skip_where_it_does_not_fit(kind, folder)
    default_llm()
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    base = conftest.make_base(folder / "base")
    try:
        put_models(kind, base / "models", conftest)
        server = conftest.Server(base, FLAGS[kind])
        yield kind, server
        server.stop()
    finally:
        shutil.rmtree(base / "models")


def skip_where_it_does_not_fit(kind, folder):
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pytest.skip("no /proc/meminfo here says how much memory is available")
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    memory = next(int(line.split()[1]) * 1024 / GIGA for line in lines if line.startswith("MemAvailable"))
    if memory < MEMORY[kind]:
        pytest.skip(f"{kind} takes {MEMORY[kind]} GB of memory, {memory:.1f} GB are available")
    disk = shutil.disk_usage(folder).free / GIGA
    if disk < DISK[kind]:
        pytest.skip(f"{kind} takes {DISK[kind]} GB of disk, {disk:.1f} GB are free in {folder}")


def put_models(kind, models, conftest):
    (models / "checkpoints").mkdir(parents=True)
    command = [
        str(conftest.comfyui_python()), str(HERE / "make_checkpoint.py"), kind,
        str(models / "checkpoints" / f"{kind}.safetensors"),
    ]  # fmt: skip
    made = subprocess.run(
        command, cwd=conftest.comfyui(), capture_output=True, text=True, env=os.environ, timeout=600
    )
    assert made.returncode == 0, made.stderr[-3000:]
    for space in ("sd15", "sd21", "sdxl"):
        make_mapper(space, models / "voken_mappers" / f"{space}.safetensors")
    # whose files are called as the workflow calls them
    shutil.copytree(STORYBOOK / "loras" / "storybook", models / "loras" / "my_adapter")


def make_mapper(name, path):
    from minigpt5_core.conditioning import SPACES
    from minigpt5_core.conditioning.mapper import build_mapper, compact_config
    from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper

    torch.manual_seed(0)
    header = MapperHeader(SPACES[name], "SmolLM2-135M-Instruct", 576, "0" * 64)
    save_mapper(path, build_mapper(compact_config(SPACES[name], 576)), header)


def chain(kind, mapper=None, text_strength=None):
    """One turn, one step, 64 x 64, with the plain nodes; with a text strength, also the checkpoint's text encoder."""
    turn = {
        "llm": ["llm", 0], "story": ["story", 0], "instruction": "", "seed": 0, "temperature": 0.7, "top_p": 0.9,
        "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 8, "pictures": "after_text",
    }  # fmt: skip
    steering = {
        "vokens": ["turn", 2], "mapper": ["mapper", 0], "picture": 1, "model": ["checkpoint", 0], "text_strength": 0.3,
    }  # fmt: skip
    sampling = {
        "model": ["checkpoint", 0], "seed": 0, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": ["steering", 0], "negative": ["steering", 1], "latent_image": ["empty", 0], "denoise": 1.0,
    }  # fmt: skip
    nodes = {
        "llm": ("MiniGPT5LoadLLM", {"llm_name": "SmolLM2-135M-Instruct", "dtype": "auto", "vokens": 8}),
        "mapper": ("MiniGPT5LoadMapper", {"mapper_name": f"{mapper or kind}.safetensors"}),
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": f"{kind}.safetensors"}),
        "story": ("MiniGPT5Story", {"text": "Mia the fox wakes up in a snowy forest."}),
        "turn": ("MiniGPT5StoryTurn", turn),
        "steering": ("MiniGPT5VokensToConditioning", steering),
        "empty": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "sampler": ("KSampler", sampling),
        "decoded": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "image": ("SaveImage", {"images": ["decoded", 0], "filename_prefix": "drawn"}),
        "latent": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "drawn"}),
    }
    if text_strength is not None:
        nodes["text"] = ("CLIPTextEncode", {"text": "a fox", "clip": ["checkpoint", 1]})
        steering |= {"text": ["text", 0], "text_strength": text_strength}
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def saved(server, file):
    return server.base / file["type"] / file["subfolder"] / file["filename"]


def check_picture(path):
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        # a picture of NaNs is saved black
        assert all(high - low > 20 for low, high in picture.getextrema())


def latent(server, result):
    found = load_file(saved(server, result.outputs["latent"]["latents"][0]))["latent_tensor"]
    assert found.shape == (1, 4, 8, 8)
    assert found.isfinite().all()
    return found


def resident(server, name):
    """Gigabytes: VmHWM is the peak with what is mapped of the checkpoint's file, RssAnon what cannot be given back."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 / GIGA for line in status.splitlines() if line.startswith(name))


def test_a_story_is_drawn_by_the_checkpoint(loaded, capsys):
    kind, server = loaded
    result = server.run(chain(kind), timeout=600)
    assert result.status == "success", result.error
    latent(server, result)
    check_picture(saved(server, result.outputs["image"]["images"][0]))
    with capsys.disabled():
        print(
            f"\n{kind}: {result.seconds:.0f} s with loading; resident at most {resident(server, 'VmHWM'):.1f} GB with "
            f"the mapped file, {resident(server, 'RssAnon'):.1f} GB without it after the run"
        )


def test_the_vokens_steer_the_checkpoint_and_its_text_encoder_joins_in(loaded):
    kind, server = loaded
    results = [server.run(chain(kind, text_strength=strength), timeout=600) for strength in (0.0, 0.5)]
    assert [result.status for result in results] == ["success"] * 2, results[-1].error
    alone, blended = (latent(server, result) for result in results)
    assert (alone - blended).abs().max() > 1e-3


def test_a_mapper_for_another_model_is_refused_before_the_sampler(loaded):
    kind, server = loaded
    for other in sorted(set(SPACES) - {kind}):
        result = server.run(chain(kind, mapper=other), timeout=600)
        assert result.status == "error"
        assert f"{other}.safetensors answers in the space {SPACES[other]}" in result.error
        assert f"this MODEL takes {SPACES[kind]}" in result.error
        assert "sampler" not in result.ran


def test_the_checkpoint_workflow_runs_with_files_of_ones_own(loaded):
    kind, server = loaded
    file = HERE / "workflows" / f"{WORKFLOW}.api.json"
    graph = json.loads(file.read_text(encoding="utf-8"))
    mine = {"ckpt_name": f"{kind}.safetensors", "mapper_name": f"{kind}.safetensors"}
    short = {"scenes": 1, "steps": 1, "width": 64, "height": 64, "max_new_tokens": 8}
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in (mine | short).items() if name in node["inputs"]}
    result = server.run(graph, timeout=600)
    assert result.status == "success", result.error
    save = next(name for name, node in graph.items() if node["class_type"] == "MiniGPT5SaveStory")
    (page,) = result.outputs[save]["minigpt5_pages"]
    assert page["text"]
    check_picture(saved(server, page["picture"]))


def test_a_mapper_is_fitted_to_the_checkpoints_text_encoders_and_drives_it(loaded, capsys):
    kind, server = loaded
    train = {
        "llm": ["llm", 0], "clip": ["checkpoint", 1], "texts": "", "style": "a drawing of {caption}", "name": "fitted",
        "steps": 20, "batch": 4, "learning_rate": 1e-3, "seed": 0, "scenes": 24,
    }  # fmt: skip
    graph = chain(kind) | {
        "mapper": {"class_type": "MiniGPT5TrainMapper", "inputs": train},
        "losses": {"class_type": "PreviewAny", "inputs": {"source": ["mapper", 1]}},
    }
    result = server.run(graph, timeout=900)
    assert result.status == "success", result.error
    losses = json.loads(result.outputs["losses"]["text"][0])["loss"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    latent(server, result)
    check_picture(saved(server, result.outputs["image"]["images"][0]))
    with capsys.disabled():
        print(
            f"\n{kind}: 20 steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, {result.seconds:.0f} s with loading; "
            f"resident at most {resident(server, 'VmHWM'):.1f} GB with the mapped file"
        )


@needs_chromium
def test_the_template_trains_and_tells_in_the_browser(loaded, browser):
    """With fewer steps and smaller pictures than the template's, the rest as a user finds it."""
    kind, server = loaded
    if kind != "sd15":
        pytest.skip("the template names SD 1.5")
    changes = {
        "CheckpointLoaderSimple": {"ckpt_name": "sd15.safetensors"},
        "MiniGPT5TrainMapper": {"steps": 20, "scenes": 24},
        "MiniGPT5Interleaver": {"scenes": 2, "steps": 1, "width": 64, "height": 64},
    }
    server.post("/settings/Comfy.TutorialCompleted", True)
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.goto(f"http://{server.address}")
    page.wait_for_function("window.app?.extensionManager?.setting && window.app.graph", timeout=120_000)
    page.locator(".templates-tab-button, button[aria-label*='Templates']").first.click()
    page.get_by_text(re.compile("minigpt5", re.IGNORECASE)).first.click(timeout=60_000)
    page.get_by_text(TEMPLATE, exact=True).first.click(timeout=60_000)
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'MiniGPT5TrainMapper')")
    page.evaluate(
        """changes => {
            for (const node of window.app.graph.nodes)
                for (const widget of node.widgets ?? [])
                    if (widget.name in (changes[node.type] ?? {})) widget.value = changes[node.type][widget.name];
        }""",
        changes,
    )
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function("document.querySelectorAll('.minigpt5-picture').length >= 4", timeout=900_000)
    page.wait_for_timeout(1000)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "your_checkpoint.png")
    assert (server.base / "models" / "voken_mappers" / "my_checkpoint.safetensors").is_file()
    context.close()
