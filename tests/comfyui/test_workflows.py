"""The shared workflows: those that need no files of the user's run as they are, and each fits this ComfyUI."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.storybook.models.scorer import load_scorer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OWN = "Continue a story from your own pictures"
SHARED = sorted((HERE.parents[1] / "workflows").glob("*.json"))
TWINS = {
    file.name.removesuffix(".api.json"): file for file in sorted((HERE / "workflows").glob("*.api.json"))
}
FRONTEND_ONLY = {"MarkdownNote", "Note"}
SHORT = {
    "scenes": 2,
    "steps": 4,
    "max_new_tokens": 24,
}  # what a run may be cut down to without losing its point


def twin(name):
    return json.loads(TWINS[name].read_text(encoding="utf-8"))


def classes(graph):
    return [node["class_type"] for node in graph.values()]


def of_class(graph, name):
    return [number for number, node in graph.items() if node["class_type"] == name]


def shorten(graph, **changes):
    for node in graph.values():
        known = {name: value for name, value in (SHORT | changes).items() if name in node["inputs"]}
        node["inputs"] |= known
    return graph


NEED_FILES = [name for name in TWINS if "CheckpointLoaderSimple" in classes(twin(name))]
COMPLETE = [name for name in TWINS if name not in NEED_FILES]


@pytest.fixture(scope="module")
def own_pictures(server):
    """Two pictures in the input folder: one of the name that the workflow has, one of another size."""
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    grey = Image.linear_gradient("L")
    grey.resize((96, 64)).convert("RGB").save(folder / "example.png")
    grey.rotate(90).resize((64, 64)).convert("RGB").save(folder / "another.png")


@pytest.fixture(scope="module")
def run_shared(server, own_pictures):
    """Runs a shared workflow, made short: run_shared(name) -> (graph, result); the same again for the same name."""
    done = {}

    def run(name):
        if name not in done:
            graph = shorten(twin(name))
            done[name] = graph, server.run(graph)
        graph, result = done[name]
        assert result.status == "success", result.error
        return graph, result

    return run


def shown(server, result, *nodes):
    """The pictures that these nodes have put out."""
    files = [file for node in nodes for file in result.outputs[node]["images"]]
    pictures = []
    for file in files:
        with Image.open(server.base / file["type"] / file["subfolder"] / file["filename"]) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def contrast(picture):
    low, high = picture.convert("L").getextrema()
    return high - low


@pytest.mark.parametrize("name", COMPLETE)
def test_a_workflow_runs_as_it_is_shared(server, run_shared, name):
    graph, result = run_shared(name)
    ends = [node for kind in ("PreviewImage", "MiniGPT5SaveStory") for node in of_class(graph, kind)]
    assert ends
    for node in ends:
        pictures = shown(server, result, node)
        assert pictures
        assert all(contrast(picture) > 20 for picture in pictures)


@pytest.mark.parametrize(
    ("name", "scenes"),
    [
        ("Storybook quickstart", 2),
        ("Storybook by hand", 3),
        (OWN, 3),
    ],
)
def test_a_storys_every_page_has_a_text_and_a_picture_of_its_own(server, run_shared, name, scenes):
    graph, result = run_shared(name)
    (save,) = of_class(graph, "MiniGPT5SaveStory")
    pages = result.outputs[save]["minigpt5_pages"]
    assert len(pages) == scenes
    assert all(page["picture"] for page in pages)
    silent = name == OWN  # begins with a picture alone
    assert [bool(page["text"]) for page in pages] == [not silent, *[True] * (scenes - 1)]
    assert len({picture.tobytes() for picture in shown(server, result, save)}) == scenes


def test_a_story_that_begins_with_a_picture_alone_goes_on_with_its_hero(server):
    """No word says who the story is about: the LLM has looked."""
    graph = shorten(twin(OWN), steps=20)
    (save,) = of_class(graph, "MiniGPT5SaveStory")
    result = server.run(graph)
    seen = load_scorer(ROOT / "storybook" / "benchmark" / "scorer.safetensors").read(
        shown(server, result, save)
    )
    assert [state.hero for state in seen] == ["lion"] * 3


@pytest.mark.parametrize("name", ["Vokens blended with a text prompt", "Two-stage beside vokens"])
def test_a_comparison_shows_two_pictures_of_one_size_that_differ(server, run_shared, name):
    graph, result = run_shared(name)
    first, second = shown(server, result, *of_class(graph, "PreviewImage"))
    assert first.size == second.size == (128, 128)
    assert first.tobytes() != second.tobytes()


def test_a_story_goes_on_from_several_pictures_of_ones_own(server, own_pictures):
    graph = shorten(twin(OWN), scenes=1)
    (load,), (story,), (save,) = (
        of_class(graph, kind) for kind in ("LoadImage", "MiniGPT5Story", "MiniGPT5SaveStory")
    )
    graph["another"] = {"class_type": "LoadImage", "inputs": {"image": "another.png"}}
    graph["both"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": [load, 0], "image2": ["another", 0]},
    }
    graph[story]["inputs"] |= {"image": ["both", 0], "text": "Leo the bear has a friend."}
    result = server.run(graph)
    assert result.status == "success", result.error
    pages = result.outputs[save]["minigpt5_pages"]
    assert [bool(page["text"]) for page in pages] == [True, False, True]  # the text is the first page's
    mine, other, drawn = shown(server, result, save)
    assert mine.size == other.size == (96, 64)  # a batch has one size
    assert drawn.size == (128, 128)
    with Image.open(server.base / "input" / "example.png") as example:
        assert mine.tobytes() == example.tobytes()
    assert other.tobytes() != mine.tobytes()


@pytest.mark.parametrize("name", NEED_FILES)
def test_a_workflow_without_its_files_is_refused_by_their_names(server, name):
    graph = twin(name)
    wanted = [
        node["inputs"][key]
        for node in graph.values()
        for key in ("ckpt_name", "mapper_name", "adapter_name")
        if node["inputs"].get(key, "storybook") != "storybook"
    ]
    result = server.run(graph)
    assert result.status == "refused"
    assert len(wanted) == (1 if "MiniGPT5TrainMapper" in classes(graph) else 3)
    assert all(f"'{file}'" in result.error for file in wanted), result.error


def test_there_are_workflows_of_both_kinds_and_each_has_a_twin():
    assert len(COMPLETE) >= 5
    assert len(NEED_FILES) >= 2
    assert [file.stem for file in SHARED] == sorted(TWINS)


@pytest.mark.parametrize("file", SHARED, ids=lambda file: file.stem)
def test_this_comfyui_knows_every_node_of_a_workflow(server, file):
    used = {node["type"] for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]}
    assert used - set(server.get("/object_info")) <= FRONTEND_ONLY


@pytest.mark.parametrize("file", SHARED, ids=lambda file: file.stem)
def test_the_browsers_workflow_is_the_one_that_ran(file):
    shared, graph = json.loads(file.read_text(encoding="utf-8")), twin(file.stem)
    nodes = {node["id"]: node for node in shared["nodes"] if node["type"] not in FRONTEND_ONLY}
    assert {str(number): node["type"] for number, node in nodes.items()} == {
        number: node["class_type"] for number, node in graph.items()
    }
    assert links_of_ui(shared["links"], nodes) == links_of_api(graph)
    for number, node in nodes.items():
        constants = [value for value in graph[str(number)]["inputs"].values() if not isinstance(value, list)]
        assert all(value in node["widgets_values"] for value in constants)


def links_of_ui(table, nodes):
    """{(from node, output, to node, input's name)}; both ends of each link know of it, as the browser needs."""
    found = set()
    for number, origin, slot, target, place, _ in table:
        entry = nodes[target]["inputs"][place]
        assert entry["link"] == number
        assert number in nodes[origin]["outputs"][slot]["links"]
        found.add((str(origin), slot, str(target), entry["name"]))
    assert len(found) == sum(entry["link"] is not None for node in nodes.values() for entry in node["inputs"])
    return found


def links_of_api(graph):
    return {
        (value[0], value[1], number, name)
        for number, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
