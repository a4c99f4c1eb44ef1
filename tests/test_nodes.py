"""The pack as ComfyUI loads it: what nodes it offers, and that every ComfyUI from 0.3.64 on takes them."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / "comfy_stand_ins"
NODES = [
    "MiniGPT5LoadLLM",
    "MiniGPT5LoadAdapter",
    "MiniGPT5LoadMapper",
    "MiniGPT5LoadDiffusers",
    "MiniGPT5Story",
    "MiniGPT5LoadStory",
    "MiniGPT5StoryTurn",
    "MiniGPT5VokensToConditioning",
    "MiniGPT5AddPicture",
    "MiniGPT5Interleaver",
    "MiniGPT5StoryParts",
    "MiniGPT5ViewStory",
    "MiniGPT5SaveStory",
    "MiniGPT5TrainMapper",
    "MiniGPT5Keep",
]
HEAVY = {"torch", "transformers", "safetensors", "diffusers", "peft", "accelerate", "numpy", "PIL", "gguf"}


@pytest.fixture
def schemas(pack):
    return {name: node.GET_SCHEMA() for name, node in pack.nodes.items()}


def test_the_pack_offers_these_nodes(pack):
    assert list(pack.nodes) == NODES  # saved workflows know them by these ids


def test_every_node_has_a_name_of_its_own_in_a_category_of_its_kind(schemas):
    names = [schema.display_name for schema in schemas.values()]
    assert len(set(names)) == len(NODES)
    assert all(name.endswith("(MiniGPT-5)") for name in names)
    kinds = {
        "MiniGPT5Load": "MiniGPT-5/loaders",
        "MiniGPT5Trai": "MiniGPT-5/training",
        "MiniGPT5Keep": "MiniGPT-5/inside",
    }
    assert all(schema.category == kinds.get(schema.node_id[:12], "MiniGPT-5") for schema in schemas.values())
    assert [schema.node_id for schema in schemas.values() if schema.is_experimental] == [
        "MiniGPT5TrainMapper"
    ]


def test_every_node_says_what_it_does_and_puts_something_out(schemas):
    assert all(schema.description.endswith(".") for schema in schemas.values())
    assert all(schema.outputs for schema in schemas.values())


def test_the_nodes_that_may_end_a_graph_put_something_out_all_the_same(schemas):
    ends = {name: schema.outputs for name, schema in schemas.items() if schema.is_output_node}
    assert {name: [end.io_type for end in outputs] for name, outputs in ends.items()} == {
        "MiniGPT5ViewStory": ["MINIGPT5_STORY"],
        "MiniGPT5SaveStory": ["MINIGPT5_STORY"],
        "MiniGPT5TrainMapper": ["MINIGPT5_MAPPER", "LOSS_MAP", "INT"],
    }


def test_the_pack_gives_comfyui_an_entry_point_a_web_folder_and_no_nodes_of_the_old_kind(pack):
    assert (ROOT / pack.module.WEB_DIRECTORY).is_dir()
    assert not hasattr(pack.module, "NODE_CLASS_MAPPINGS")  # ComfyUI would look no further


@pytest.mark.parametrize("name", NODES)
def test_a_node_takes_just_the_inputs_that_it_shows(pack, schemas, name):
    parameters = inspect.signature(pack.nodes[name].execute).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return
    shown = {end.id: end.optional for end in schemas[name].inputs}
    assert {parameter.name for parameter in parameters} == set(shown)
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    assert not needed & {id for id, optional in shown.items() if optional}


@pytest.mark.parametrize("function", ["validate_inputs", "fingerprint_inputs"])
@pytest.mark.parametrize("name", NODES)
def test_what_comfyui_asks_of_a_node_beforehand_is_asked_by_its_inputs(pack, schemas, name, function):
    asked = getattr(pack.nodes[name], function, None)
    if asked is None:
        return
    kinds = inspect.signature(asked).parameters
    named = {key for key, parameter in kinds.items() if parameter.kind != parameter.VAR_KEYWORD}
    shown = {end.id for end in schemas[name].inputs}
    assert named <= shown
    if function == "fingerprint_inputs" and len(named) == len(kinds):  # it gets every input that there is
        assert named == shown


def test_only_the_interleaver_takes_links_as_they_are_and_all_of_them(schemas):
    raw = {
        name: [end.id for end in schema.inputs if (getattr(end, "extra_dict", None) or {}).get("rawLink")]
        for name, schema in schemas.items()
    }
    links = [end.id for end in schemas["MiniGPT5Interleaver"].inputs if not hasattr(end, "default")]
    assert {name: ids for name, ids in raw.items() if ids} == {"MiniGPT5Interleaver": links}
    assert [name for name, schema in schemas.items() if schema.enable_expand] == ["MiniGPT5Interleaver"]


def test_defaults_are_among_the_options_and_within_the_limits(schemas):
    for schema in schemas.values():
        for end in schema.inputs:
            if end.io_type == "COMBO" and end.default is not None:
                assert end.default in end.options, (schema.node_id, end.id)
            elif end.io_type in ("INT", "FLOAT"):
                assert end.min <= end.default <= end.max, (schema.node_id, end.id)


def test_a_comfyui_that_does_not_know_of_search_words_is_not_told_them(host, load_pack):
    with pytest.raises(TypeError, match="search_aliases"):  # it would refuse the whole pack
        host("comfy_api.latest").io.Schema(node_id="a", search_aliases=[])
    schema = load_pack().nodes["MiniGPT5Interleaver"].GET_SCHEMA()
    assert schema.enable_expand
    assert not hasattr(schema, "search_aliases")


def test_a_comfyui_that_knows_of_search_words_is_told_them(host, load_pack, monkeypatch):
    """As the Schema of ComfyUI 0.38 does."""
    io = host("comfy_api.latest").io
    more = [("search_aliases", list, dataclasses.field(default=None)), ("is_dev_only", bool, False)]
    monkeypatch.setattr(io, "Schema", dataclasses.make_dataclass("Schema", more, bases=(io.Schema,)))
    schema = load_pack().nodes["MiniGPT5Interleaver"].GET_SCHEMA()
    assert "comic" in schema.search_aliases
    assert schema.is_dev_only is False


def test_loading_the_pack_imports_nothing_heavy_and_leaves_no_trace(tmp_path):
    code = f"""
import asyncio, importlib.util, sys
before, path = set(sys.modules), list(sys.path)
spec = importlib.util.spec_from_file_location("a_pack", {str(ROOT / "__init__.py")!r})
sys.modules["a_pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

async def nodes():
    return await (await pack.comfy_entrypoint()).get_node_list()

import folder_paths, pathlib
folder_paths.use(pathlib.Path({str(tmp_path)!r}))
schemas = [node.GET_SCHEMA() for node in asyncio.run(nodes())]
assert sys.path == path
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}), len(schemas))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(STAND_INS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    *modules, count = done.stdout.split()
    assert int(count) == len(NODES)
    assert "a_pack" in modules
    assert not set(modules) & (HEAVY | {"nodes", "minigpt5_core", "trainer", "tests"})
