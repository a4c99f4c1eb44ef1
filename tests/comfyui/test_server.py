"""The nodes on a real ComfyUI server: stories, what is kept and what runs again, cancel, memory, bad input."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

IDS = {
    "MiniGPT5LoadLLM", "MiniGPT5LoadAdapter", "MiniGPT5LoadMapper", "MiniGPT5LoadDiffusers", "MiniGPT5Story",
    "MiniGPT5LoadStory", "MiniGPT5StoryTurn", "MiniGPT5VokensToConditioning", "MiniGPT5AddPicture",
    "MiniGPT5Interleaver", "MiniGPT5StoryParts", "MiniGPT5ViewStory", "MiniGPT5SaveStory", "MiniGPT5TrainMapper",
}  # fmt: skip


def scenes_that_ran(result):
    """The numbers of the scenes whose turn was told and whose picture was drawn."""
    told = {node.split("scene_")[1].split("_")[0] for node in result.ran if node.endswith("_turn")}
    drawn = {node.split("scene_")[1].split("_")[0] for node in result.ran if node.endswith("_sampler")}
    assert told == drawn
    return sorted(map(int, told))


@pytest.mark.comfyui_smoke
def test_a_cold_server_knows_every_node(server):
    info = server.get("/object_info")
    assert IDS <= set(info)
    assert all(info[name]["category"].startswith("MiniGPT-5") for name in IDS)


@pytest.mark.comfyui_smoke
def test_the_quickstart_tells_draws_and_saves(server, graph):
    result = server.run(graph(scenes=2, seed=11))
    assert result.status == "success", result.error
    pages = result.outputs["view"]["minigpt5_pages"]
    assert len(pages) == 2
    assert all(page["text"] and page["picture"] for page in pages)
    assert "fox" in pages[0]["text"]
    assert result.outputs["view"]["text"] == ["\n\n".join(page["text"] for page in pages)]
    saved = result.outputs["save"]["images"][0]
    folder = server.base / "output" / saved["subfolder"]
    story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    assert [scene["text"] for scene in story["scenes"]] == [page["text"] for page in pages]
    with Image.open(folder / "scene_01.png") as picture:
        assert picture.size == (128, 128)
        assert json.loads(picture.text["prompt"])["story"]["class_type"] == "MiniGPT5Story"
        assert picture.convert("L").getextrema()[1] > 100  # not black
    assert {"story.html", "story.md", "strip.png"} <= {path.name for path in folder.iterdir()}


def test_tokens_and_steps_tick(server, graph):
    result = server.run(graph(scenes=1, seed=12, steps=4))
    turn = [value for node, value, total in result.progress if total == 24 + 8]
    steps = [value for node, value, total in result.progress if total == 4]
    assert turn[0] == 1 and len(turn) >= 3 and turn == sorted(set(turn))  # newer versions send only some
    assert steps[-1] == 4


def test_only_what_an_edit_touches_runs_again(server, graph):
    def run(**changes):
        return scenes_that_ran(server.run(graph(seed=21, **changes)))

    assert run(scenes=3) == [1, 2, 3]
    assert run(scenes=3) == []
    assert run(scenes=3) == []
    assert run(scenes=4) == [4]
    assert run(scenes=4, instructions="\n\nGive Mia a red balloon.") == [3, 4]
    assert run(scenes=2, instructions="\n\nGive Mia a red balloon.") == []
    assert run(scenes=2, instructions="Mia finds a key.") == [1, 2]


def test_a_model_file_that_was_replaced_is_read_again(server, graph):
    folder = server.base / "models" / "voken_mappers"
    folder.mkdir(parents=True, exist_ok=True)
    shipped = Path(__file__).parents[2] / "storybook" / "voken_mappers" / "storybook.safetensors"
    shutil.copyfile(shipped, folder / "mine.safetensors")
    prompt = graph(scenes=1, seed=23)
    prompt["mapper"]["inputs"]["mapper_name"] = "mine.safetensors"
    assert "mapper" in server.run(prompt).ran
    assert server.run(prompt).ran == []
    shutil.copyfile(shipped, folder / "new.safetensors")
    os.replace(folder / "new.safetensors", folder / "mine.safetensors")
    again = server.run(prompt).ran
    assert "mapper" in again and "llm" not in again
    assert any(node.endswith("_sampler") for node in again) and not any(
        node.endswith("_turn") for node in again
    )


def test_an_instruction_and_the_opening_change_the_story(server, graph):
    def text(**changes):
        return server.run(graph(seed=22, **changes)).outputs["view"]["text"][0]

    assert text(scenes=1) != text(scenes=1, prompt="Leo the bear finds a red balloon on the beach.")


def test_cancel_stops_within_a_few_tokens_and_the_queue_goes_on(server, graph):
    began = []

    def cancel(node, value, total):
        if total == 4008 and not began:
            began.append(time.monotonic())
            server.post("/interrupt", {})

    # so long a bar moves after every 20th token only, and a turn is over by then
    result = server.run(graph(scenes=3, seed=31, max_new_tokens=4000), on_progress=cancel)
    assert result.status == "interrupted"
    assert time.monotonic() - began[0] < 5
    assert result.ran[-1].endswith("scene_1_turn")
    assert server.run(graph(scenes=1, seed=32)).status == "success"


def test_two_prompts_queued_both_come_out(server, graph):
    answers = [server.post("/prompt", {"prompt": graph(scenes=1, seed=seed)}) for seed in (41, 42)]
    deadline = time.monotonic() + 120
    histories = [{}, {}]
    while not all(histories) and time.monotonic() < deadline:
        histories = [server.get(f"/history/{answer['prompt_id']}") for answer in answers]
        time.sleep(0.2)
    for answer, history in zip(answers, histories, strict=True):
        assert history[answer["prompt_id"]]["status"]["status_str"] == "success"


def test_free_gives_the_memory_back(server, graph):
    assert server.run(graph(scenes=1, seed=51)).status == "success"
    before, after = server.free()
    print(f"resident: {before:.0f} MB before, {after:.0f} MB after /free")
    assert after < before - 300  # the LLM alone is 540 MB in float32
    assert server.run(graph(scenes=1, seed=52)).status == "success"


def test_without_the_adapter_nothing_of_it_is_left(server, graph):
    """Adapter, no adapter, adapter: the plain LLM answers as a server that never saw an adapter would."""
    plain = graph(scenes=1, seed=53)
    plain["interleaver"]["inputs"]["llm"] = ["llm", 0]
    first = server.run(plain).outputs["view"]["text"]
    server.run(graph(scenes=1, seed=54))
    plain["interleaver"]["inputs"]["steps"] = 5  # so that the turn alone could come from the cache
    plain["story"]["inputs"]["text"] += " "
    again = server.run(plain)
    assert again.outputs["view"]["text"] == first


def test_an_adapter_at_other_strengths_leaves_later_stories_as_they_were(server, graph):
    rounds = iter(range(1, 10))

    def text(strength):
        told = graph(scenes=1, seed=61)
        told["adapter"]["inputs"]["strength"] = strength
        told["story"]["inputs"]["text"] += " " * next(rounds)  # so that nothing comes from the cache
        return server.run(told).outputs["view"]["text"]

    first = text(1.0)
    found = [text(strength) for strength in (0.9, 1.0, 0.5, 1.0)]
    assert found[1] == found[3] == first and found[2] != first


def test_a_mapper_for_another_model_is_refused_before_the_sampler(server, graph, tmp_path):
    prompt = graph(scenes=1, seed=61)
    make_sd15_mapper(server.base / "models" / "voken_mappers" / "sd15.safetensors")
    prompt["mapper"]["inputs"]["mapper_name"] = "sd15.safetensors"
    result = server.run(prompt)
    assert result.status == "error"
    assert "sd15 (77 x 768)" in result.error
    assert "storybook (77 x 128)" in result.error
    assert not any(node.endswith("_sampler") for node in result.ran)


def make_sd15_mapper(path):
    from minigpt5_core.conditioning import SPACES
    from minigpt5_core.conditioning.mapper import build_mapper, compact_config
    from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper

    space = SPACES["sd15"]
    header = MapperHeader(space, "SmolLM2-135M-Instruct", 576, "0" * 64)
    save_mapper(path, build_mapper(compact_config(space, 576)), header)


@pytest.mark.parametrize(
    ("node", "name", "folder"),
    [
        ("mapper", "mapper_name", "voken_mappers"),
        ("llm", "llm_name", "LLM"),
        ("adapter", "adapter_name", "loras"),
    ],
)
def test_a_missing_file_names_every_folder_that_was_searched(server, graph, node, name, folder):
    prompt = graph()
    prompt[node]["inputs"][name] = "nowhere"
    result = server.run(prompt)
    assert result.status == "refused"
    assert str(server.base / "models" / folder) in result.error
    assert f"storybook/{folder}" in result.error
    assert "choose another in the node" in result.error


def test_a_path_out_of_the_output_folder_is_refused(server, graph):
    prompt = graph(scenes=1, seed=62)
    prompt["save"]["inputs"]["filename_prefix"] = "../../outside/story"
    result = server.run(prompt)
    assert result.status == "error"
    assert "filename_prefix" in result.error
    assert not (server.base.parent / "outside").exists()


def test_a_batch_of_images_becomes_pages_and_only_the_first_goes_on_a_page(server, graph):
    prompt = graph(scenes=1, seed=63)
    prompt["empty"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 255},
    }
    prompt["story"]["inputs"] = {"text": "Mia the fox is in the snow.", "image": ["empty", 0]}
    prompt["pictured"] = {
        "class_type": "MiniGPT5AddPicture",
        "inputs": {"story": ["story", 0], "image": ["empty", 0]},
    }
    prompt["view"]["inputs"]["story"] = ["pictured", 0]
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert [bool(page["picture"]) for page in result.outputs["view"]["minigpt5_pages"]] == [True] * 3


@pytest.mark.parametrize(
    "text",
    [
        "\u05de\u05d9\u05d4 \u05d4\u05e9\u05d5\u05e2\u05dc",
        "\u72d0\u72f8\u306e\u7269\u8a9e \U0001f98a",
        '"quoted" \\ back\nline <script>alert(1)</script>',
    ],
    ids=["right to left", "unicode", "markup"],
)
def test_any_script_is_told_shown_and_saved(server, graph, text):
    result = server.run(graph(prompt=text, scenes=1, seed=64))
    assert result.status == "success", result.error
    folder = server.base / "output" / result.outputs["save"]["images"][0]["subfolder"]
    assert json.loads((folder / "story.json").read_text(encoding="utf-8"))["prompt"] == text
    assert "<script>" not in (folder / "story.html").read_text(encoding="utf-8")


def test_an_opening_longer_than_the_context_says_so(server, graph):
    result = server.run(graph(prompt="fox " * 10_000, scenes=1, seed=65))
    assert result.status == "error"
    assert "Shorten the prompt" in result.error


def test_ten_thousand_characters_are_told_where_they_fit(server, graph):
    result = server.run(
        graph(prompt=("Mia the fox wakes up in a snowy forest. " * 250)[:10_000].strip(), scenes=1, seed=66)
    )
    assert result.status == "success" or "Shorten the prompt" in result.error


def test_an_empty_opening_says_so(server, graph):
    result = server.run(graph(prompt="  ", scenes=1))
    assert result.status == "error"
    assert "Write how it begins" in result.error


def test_a_story_of_twenty_scenes(server, graph):
    result = server.run(graph(scenes=20, seed=71, steps=2, max_new_tokens=12), timeout=600)
    assert result.status == "success", result.error
    assert len(result.outputs["view"]["minigpt5_pages"]) == 20


def test_a_saved_story_is_read_again_after_a_restart(server, graph):
    first = server.run(graph(scenes=2, seed=81))
    saved = first.outputs["save"]["images"][0]["subfolder"]
    server.stop()
    server.start()
    prompt = graph(scenes=1, seed=82)
    prompt["story"] = {"class_type": "MiniGPT5LoadStory", "inputs": {"story_name": saved}}
    result = server.run(prompt)
    assert result.status == "success", result.error
    texts = [page["text"] for page in result.outputs["view"]["minigpt5_pages"]]
    assert texts[:2] == [page["text"] for page in first.outputs["view"]["minigpt5_pages"]]
    assert len(texts) == 3


def test_the_pack_is_imported_in_a_fifth_of_a_second(server):
    log = Path(server.log).read_text(encoding="utf-8")
    seconds = re.search(
        r"([\d.]+) seconds.*comfyui-minigpt5\s*$", log, re.MULTILINE
    )  # newer lines begin with a colour
    assert float(seconds[1]) < 0.2
