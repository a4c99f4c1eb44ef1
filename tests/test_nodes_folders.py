"""Where the nodes find their files, and what they say of one that is not there."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORYBOOK = ROOT / "storybook"
LOADERS = {
    "MiniGPT5LoadLLM": ("LLM", "llm_name"),
    "MiniGPT5LoadAdapter": ("loras", "adapter_name"),
    "MiniGPT5LoadMapper": ("voken_mappers", "mapper_name"),
    "MiniGPT5LoadDiffusers": ("diffusers", "model_name"),
}


@pytest.fixture
def models(tmp_path):
    return tmp_path / "comfyui" / "models"


def put(file: Path, content: str = "{}") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def choices(pack, node_id):
    """What the dropdown of a loader offers."""
    wanted = LOADERS[node_id][1]
    return next(end.options for end in pack.nodes[node_id].GET_SCHEMA().inputs if end.id == wanted)


def test_a_fresh_comfyui_offers_the_storybook(pack):
    assert choices(pack, "MiniGPT5LoadLLM") == ["SmolLM2-135M-Instruct"]
    assert choices(pack, "MiniGPT5LoadAdapter") == ["storybook"]
    assert choices(pack, "MiniGPT5LoadMapper") == ["storybook.safetensors"]
    assert choices(pack, "MiniGPT5LoadDiffusers") == ["storybook"]


def test_the_users_own_files_are_offered_beside_it(pack, models):
    put(models / "LLM" / "mine" / "config.json")
    put(models / "LLM" / "no_llm" / "readme.txt")
    put(models / "loras" / "deep" / "mine" / "adapter_model.safetensors")
    put(models / "loras" / "style.safetensors")  # a LoRA for pictures
    put(models / "voken_mappers" / "mine" / "mapper.safetensors")
    put(models / "diffusers" / "mine" / "model_index.json")
    assert choices(pack, "MiniGPT5LoadLLM") == ["SmolLM2-135M-Instruct", "mine"]
    assert choices(pack, "MiniGPT5LoadAdapter") == ["deep/mine", "storybook"]
    assert choices(pack, "MiniGPT5LoadMapper") == ["mine/mapper.safetensors", "storybook.safetensors"]
    assert choices(pack, "MiniGPT5LoadDiffusers") == ["storybook", "mine"]


def test_gguf_files_and_folders_that_hold_one_are_offered_as_llms(pack, models):
    file = put(models / "LLM" / "small-Q8_0.gguf")
    folder = put(models / "LLM" / "single" / "model.gguf").parent
    put(models / "LLM" / "two" / "a.gguf")
    put(models / "LLM" / "two" / "b.gguf")
    assert choices(pack, "MiniGPT5LoadLLM") == ["SmolLM2-135M-Instruct", "single", "small-Q8_0.gguf"]
    folders = pack.part("nodes.folders")
    assert [folders.find_llm(name) for name in ("small-Q8_0.gguf", "single")] == [file, folder]
    ask = pack.nodes["MiniGPT5LoadLLM"].validate_inputs
    assert "none of these folders" in ask(llm_name="two")
    put(models / "outside.gguf")
    assert "none of these folders" in ask(llm_name="../outside.gguf")


def test_the_users_folders_are_searched_before_the_packs(pack, models):
    folders = pack.part("nodes.folders")
    assert folders.find_adapter("storybook") == STORYBOOK / "loras" / "storybook"
    assert folders.find_mapper("storybook.safetensors") == STORYBOOK / "voken_mappers/storybook.safetensors"
    mine = put(models / "voken_mappers" / "storybook.safetensors")
    assert folders.find_mapper("storybook.safetensors") == mine


def test_folders_that_others_have_named_are_kept_and_ours_come_once(host, load_pack, models):
    known = host("folder_paths").folder_names_and_paths
    known["LLM"] = (["/elsewhere/LLM"], {".gguf"})
    pack = load_pack()
    pack.part("nodes.folders").register()
    ours = [str(models / "LLM"), str(STORYBOOK / "LLM")]
    assert known["LLM"] == (["/elsewhere/LLM", *ours], {".gguf", ""})
    assert known["loras"][0] == [str(models / "loras"), str(STORYBOOK / "loras")]
    assert ".safetensors" in known["loras"][1]


@pytest.mark.parametrize("node", LOADERS)
def test_a_file_that_is_not_there_is_refused_with_every_folder_that_was_searched(host, pack, node):
    key, argument = LOADERS[node]
    host("folder_paths").folder_names_and_paths[key][0].append("/elsewhere/files")
    said = pack.nodes[node].validate_inputs(**{argument: "gone"})
    assert "'gone'" in said
    searched = host("folder_paths").get_folder_paths(key)
    assert len(searched) >= 2
    assert all(f"\n  {folder}\n" in said for folder in searched)


@pytest.mark.parametrize("node", LOADERS)
def test_what_is_there_is_no_problem(pack, node):
    argument = LOADERS[node][1]
    assert pack.nodes[node].validate_inputs(**{argument: choices(pack, node)[0]}) is True


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("MiniGPT5LoadAdapter", {"llm": None, "adapter_name": "gone"}),
        ("MiniGPT5LoadMapper", {"mapper_name": "gone"}),
        ("MiniGPT5LoadDiffusers", {"model_name": "gone"}),
        ("MiniGPT5LoadLLM", {"llm_name": "gone"}),
    ],
)
def test_a_loader_refuses_what_was_lost_after_it_was_chosen(pack, node, inputs):
    with pytest.raises(
        ValueError, match="(?s)'gone' is in none of these folders:.*Put .* into .*under that name"
    ):
        pack.run(node, **inputs)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "/outside",
        "..",
    ],
)
@pytest.mark.parametrize("node", ["MiniGPT5LoadLLM", "MiniGPT5LoadDiffusers"])
def test_a_folders_name_leads_nowhere_else(pack, models, node, name):
    for mark in ("config.json", "model_index.json"):
        put(models / "outside" / mark)
        put(models / mark)
    (models / "LLM" / "a").mkdir(parents=True)
    (models / "diffusers" / "a").mkdir(parents=True)
    assert "none of these folders" in pack.nodes[node].validate_inputs(**{LOADERS[node][1]: name})


def test_an_adapters_and_a_mappers_name_lead_nowhere_else(pack, models):
    put(models / "outside.safetensors")
    put(models / "outside" / "adapter_model.safetensors")
    for folder in ("loras", "voken_mappers"):
        (models / folder).mkdir()
    ask = {name: pack.nodes[f"MiniGPT5Load{name}"].validate_inputs for name in ("Mapper", "Adapter")}
    assert "none of these folders" in ask["Mapper"](mapper_name="../outside.safetensors")
    assert "none of these folders" in ask["Adapter"](adapter_name="../outside")


def test_names_that_windows_has_written_into_a_workflow(pack, models, tmp_path):
    mapper = put(models / "voken_mappers" / "my" / "map.safetensors")
    adapter = put(models / "loras" / "my" / "lora" / "adapter_model.safetensors").parent
    story = put(tmp_path / "comfyui" / "output" / "stories" / "a" / "story.json").parent
    folders, stories = pack.part("nodes.folders"), pack.part("nodes.story")
    assert folders.find_mapper("my\\map.safetensors") == mapper
    assert folders.find_adapter("my\\lora") == adapter
    assert stories._find_story("stories\\a") == story
    assert pack.part("nodes.show")._new_folder("stories\\b")[1] == "stories/b_00001_"
    put(models / "outside.safetensors")
    ask = pack.nodes["MiniGPT5LoadMapper"].validate_inputs
    assert "none of these folders" in ask(mapper_name="..\\outside.safetensors")
    assert stories._find_story("..\\models") is None


def test_what_is_hidden_is_not_offered(pack, models, tmp_path):
    put(models / "LLM" / ".ipynb_checkpoints" / "config.json")
    put(models / "LLM" / "._a.gguf")
    put(models / "loras" / ".cache" / "adapter_model.safetensors")
    put(models / "voken_mappers" / "._mine.safetensors")
    put(tmp_path / "comfyui" / "output" / ".story.12.old" / "story.json")
    assert choices(pack, "MiniGPT5LoadLLM") == ["SmolLM2-135M-Instruct"]
    assert choices(pack, "MiniGPT5LoadAdapter") == ["storybook"]
    assert choices(pack, "MiniGPT5LoadMapper") == ["storybook.safetensors"]
    assert pack.part("nodes.story").saved_stories() == []


def test_a_macs_hidden_file_beside_a_models_is_none_of_its_weights(pack, models):
    weights, gguf = pack.part("minigpt5_core.llm.weights"), put(models / "LLM" / "one" / "model.gguf")
    put(gguf.with_name("._model.gguf"))
    whole = put(models / "LLM" / "two" / "model.safetensors")
    put(whole.with_name("._model.safetensors"))
    assert weights.gguf_in(gguf.parent) == gguf and weights.weight_files(whole.parent) == [whole]
    assert pack.nodes["MiniGPT5LoadLLM"].validate_inputs(llm_name="one") is True


def test_a_mapper_that_was_trained_anew_has_another_fingerprint(pack, models):
    file = put(models / "voken_mappers" / "mine.safetensors")
    node = pack.nodes["MiniGPT5LoadMapper"]
    first = node.fingerprint_inputs(mapper_name="mine.safetensors")
    assert node.fingerprint_inputs(mapper_name="mine.safetensors") == first
    later = file.stat().st_mtime + 5
    os.utime(file, (later, later))
    assert node.fingerprint_inputs(mapper_name="mine.safetensors") != first


def test_an_llm_or_adapter_of_which_a_file_has_changed_has_another_fingerprint(pack, models):
    llm = put(models / "LLM" / "mine" / "config.json")
    adapter = put(models / "loras" / "mine" / "adapter_model.safetensors")

    def prints():
        yield pack.nodes["MiniGPT5LoadLLM"].fingerprint_inputs(llm_name="mine", dtype="auto", vokens=8)
        # a link has no value before the graph runs
        yield pack.nodes["MiniGPT5LoadAdapter"].fingerprint_inputs(
            llm=None, adapter_name="mine", strength=1.0
        )

    first = list(prints())
    assert list(prints()) == first
    for file in (llm, adapter):
        file.write_text(json.dumps({"longer": 1}), encoding="utf-8")
    assert not set(prints()) & set(first)


# A name that comes over a link: ComfyUI says None for it until the graph runs

FILES = {
    "MiniGPT5LoadLLM": "LLM/mine/config.json",
    "MiniGPT5LoadAdapter": "loras/mine/adapter_model.safetensors",
    "MiniGPT5LoadMapper": "voken_mappers/mine.safetensors",
    "MiniGPT5LoadDiffusers": "diffusers/mine/unet/config.json",
}


@pytest.mark.parametrize("node", [*LOADERS, "MiniGPT5LoadStory"])
def test_a_name_that_is_not_known_yet_is_no_problem(pack, node):
    name = LOADERS.get(node, ("", "story_name"))[1]
    assert pack.nodes[node].validate_inputs(**{name: None}) is True
    assert pack.nodes[node].validate_inputs() is True  # it is missing, which ComfyUI itself says


@pytest.mark.parametrize("node", LOADERS)
def test_for_a_name_that_is_not_known_yet_every_file_counts(pack, models, node):
    put(models / "diffusers" / "mine" / "model_index.json")
    file, mark = put(models / FILES[node]), pack.nodes[node].fingerprint_inputs
    first = mark(**{LOADERS[node][1]: None})
    assert mark(**{LOADERS[node][1]: None}) == first
    put(file, json.dumps({"longer": 1}))
    assert mark(**{LOADERS[node][1]: None}) != first


def test_a_story_that_is_not_known_yet_is_not_another_for_every_story_that_is_saved(pack, tmp_path):
    mark = pack.nodes["MiniGPT5LoadStory"].fingerprint_inputs
    first = mark(story_name=None)
    put(tmp_path / "comfyui" / "output" / "stories" / "a" / "story.json")
    assert mark(story_name=None) == first


@pytest.mark.parametrize(("value", "said"), [(None, "No .* is chosen"), ("", "chosen"), (5, "5 is in none")])
@pytest.mark.parametrize("node", LOADERS)
def test_what_is_no_name_is_refused_when_it_comes(pack, node, value, said):
    others = {"llm": None} if node == "MiniGPT5LoadAdapter" else {}
    with pytest.raises(ValueError, match=said):
        pack.run(node, **{LOADERS[node][1]: value}, **others)


@pytest.mark.parametrize("value", [None, 5])
def test_what_is_no_storys_name_is_refused_when_it_comes(pack, value):
    with pytest.raises(ValueError, match=f"no saved story {value}"):
        pack.run("MiniGPT5LoadStory", story_name=value)


@pytest.mark.parametrize("value", ["float8", None])
def test_a_choice_that_is_none_is_refused_with_what_there_is(pack, value):
    with pytest.raises(ValueError, match=f"dtype is {value!r}; expected one of auto, float32, bfloat16"):
        pack.run("MiniGPT5LoadLLM", llm_name="SmolLM2-135M-Instruct", dtype=value)
