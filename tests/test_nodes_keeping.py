"""Kept scenes: what they are known by, what is let go of, and that nothing is asked for twice."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

LINKS = {name: [name, 0] for name in ("llm", "mapper", "model", "vae", "story")}
NAN = float("nan")


@pytest.fixture
def prompt(host):
    """A user's graph: what DynamicPrompt answers, with loaders whose marks a test may change."""
    known = host("nodes").NODE_CLASS_MAPPINGS
    graph = {name: {"class_type": f"Load_{name}", "inputs": {"name": f"my {name}"}} for name in LINKS}
    known.update({node["class_type"]: type(node["class_type"], (), {}) for node in graph.values()})
    known.update(dict.fromkeys(("EmptyLatentImage", "KSampler", "VAEDecode"), object))
    yield graph
    known.clear()


@pytest.fixture
def keys(pack, host, prompt):
    """keys(scenes=2, ...) -> by the name of every Keep node its key."""
    host("nodes").NODE_CLASS_MAPPINGS.update(pack.nodes)

    def expand(**inputs):
        hidden = {"dynprompt": SimpleNamespace(get_node=prompt.__getitem__)}
        answer = pack.run("MiniGPT5Interleaver", hidden, **{"scenes": 2, **LINKS, **inputs})
        return {
            name.rsplit(".", 1)[-1]: node["inputs"]["key"]
            for name, node in answer.expand.items()
            if node["class_type"] == "MiniGPT5Keep"
        }

    return expand


@pytest.fixture
def kept(pack):
    return pack.part("nodes.keeping").Kept


def changed(before, after):
    return [name for name in after if after[name] != before.get(name)]


def test_every_turn_and_every_picture_is_kept_by_what_it_follows_from(keys):
    found = keys()
    assert list(found) == ["scene_1_told", "scene_1_kept", "scene_2_told", "scene_2_kept"]
    assert len(set(found.values())) == 4
    assert changed(found, keys(scenes=3)) == ["scene_3_told", "scene_3_kept"]
    assert changed(found, keys(instructions="\nNight.")) == ["scene_2_told", "scene_2_kept"]
    assert changed(found, keys(steps=7)) == ["scene_1_kept", "scene_2_told", "scene_2_kept"]
    assert changed(found, keys(seed=7)) == list(found)


@pytest.mark.parametrize(
    ("node", "first"), [("llm", "scene_1_told"), ("story", "scene_1_told"), ("mapper", "scene_1_kept")]
)
def test_a_file_that_was_replaced_counts(keys, prompt, node, first):
    prompt[node]["is_changed"] = ["old"]
    before = keys()
    prompt[node]["is_changed"] = ["new"]
    assert changed(before, keys())[0] == first


def test_a_file_is_asked_after_where_comfyui_has_not(keys, prompt, host):
    marks = ["old"]
    host("nodes").NODE_CLASS_MAPPINGS["Load_vae"].IS_CHANGED = staticmethod(lambda name: marks[-1])
    before = keys()
    marks.append("new")
    assert changed(before, keys())[0] == "scene_1_kept"


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda node: node.update(is_changed=NAN), 0),
        (lambda node: node["inputs"].update(name=object()), 0),
        (lambda node: node["inputs"].update(name=NAN), 0),
    ],
    ids=["always changed", "no plain value", "NaN"],
)
def test_what_is_never_the_same_again_is_not_kept(keys, prompt, change, left):
    change(prompt["llm"])
    assert len(keys()) == left


def test_a_node_whose_answer_differs_every_time_keeps_nothing_behind_it(keys, host):
    host("nodes").NODE_CLASS_MAPPINGS["Load_mapper"].NOT_IDEMPOTENT = True
    assert list(keys()) == ["scene_1_told"]


def story(pack, *values, size=16):
    sockets = pack.part("nodes.sockets")
    pages = tuple(sockets.Page("", str(value), torch.full((size, size, 3), value)) for value in values)
    return sockets.StorySoFar("Mia.", pages)


def test_a_kept_scene_is_not_asked_for(pack):
    node, scene = pack.nodes["MiniGPT5Keep"], [story(pack, 0.5)]
    assert node.check_lazy_status(key=["a"], story=(None,), vokens=(None,)) == ["story", "vokens"]
    assert node.execute(key=["a"], story=scene, vokens=["v"]).args == (scene, ["v"])
    assert node.check_lazy_status(key=["a"], story=(None,), vokens=(None,)) == []
    assert node.execute(key=["a"], story=(None,), vokens=(None,)).args == (scene, ["v"])


def test_what_was_freed_in_between_says_so(pack):
    with pytest.raises(ValueError, match="Press Run again"):
        pack.nodes["MiniGPT5Keep"].execute(key=["gone"], story=(None,))


def test_the_least_used_goes_first_and_a_shared_picture_counts_once(pack, kept):
    picture = 16 * 16 * 3 * 4
    store = kept(limit=2 * picture)
    first = story(pack, 0.1)
    second = first.with_page(story(pack, 0.2).pages[0])
    store.put("first", ([first], []))
    store.put("second", ([second], []))
    assert store.size() == 2 * picture  # two pictures, one of them in both
    store.get("first")
    store.put("third", ([story(pack, 0.3)], []))
    assert list(store.results) == ["first", "third"]


def test_a_picture_larger_than_all_is_kept_alone(pack, kept):
    store = kept(limit=10)
    store.put("first", ([story(pack, 0.1)], []))
    store.put("second", ([story(pack, 0.2)], []))
    assert list(store.results) == ["second"]


@pytest.mark.parametrize(
    ("method", "path", "left"), [("POST", "/api/free", 0), ("POST", "/free", 0), ("GET", "/free", 1)]
)
def test_comfyuis_unload_frees_all(pack, host, method, path, left):
    keeping = pack.part("nodes.keeping")
    keeping.KEPT.put("first", ([story(pack, 0.1)], []))
    (on_answer,) = host("server").PromptServer.instance.app.on_response_prepare
    asyncio.run(on_answer(SimpleNamespace(method=method, path=path), None))
    assert len(keeping.KEPT.results) == left
