"""The Interleaver becomes a chain of the plain nodes: which ones, in what order, and what an edit leaves alone."""

import inspect

import pytest

LAST = 2**64 - 1
LINKS = {name: [name, 0] for name in ("llm", "mapper", "model", "vae", "story")}
CORE = {
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "KSampler": {
        "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image",
        "denoise",
    },
    "VAEDecode": {"samples", "vae"},
}  # fmt: skip
OF_A_SCENE = [
    "MiniGPT5StoryTurn",
    "MiniGPT5VokensToConditioning",
    "KSampler",
    "VAEDecode",
    "MiniGPT5AddPicture",
]


@pytest.fixture
def expand(pack):
    """expand(scenes=2, ...) -> what the node puts out: its outputs are links into its graph."""
    return lambda **inputs: pack.run("MiniGPT5Interleaver", **{"scenes": 2, **LINKS, **inputs})


def of_class(graph, class_type):
    return {name: node["inputs"] for name, node in graph.items() if node["class_type"] == class_type}


def column(graph, class_type, key):
    """One input of all nodes of a class, in their order."""
    return [inputs[key] for inputs in of_class(graph, class_type).values()]


@pytest.mark.parametrize("scenes", [1, 3, 100])
def test_a_scene_is_five_nodes_and_all_share_a_latent_and_one_end(expand, scenes):
    graph = expand(scenes=scenes).expand
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds == ["EmptyLatentImage", *OF_A_SCENE * scenes, "MiniGPT5StoryParts"]


def test_nodes_are_named_by_their_scene_so_that_each_is_kept_by_itself(expand):
    names = [name.rsplit(".", 1)[-1] for name in expand().expand]
    parts = ["turn", "conditioning", "sampler", "decode", "picture"]
    assert names == [
        "latent",
        *(f"scene_{scene}_{part}" for scene in (1, 2) for part in parts),
        "parts",
    ]


def test_a_scenes_nodes_hand_on_to_one_another(expand):
    graph = expand(scenes=1).expand
    latent, turn, conditioning, sampler, decode, picture, parts = graph
    wires = {
        (name, key): tuple(value)
        for name, node in graph.items()
        for key, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert wires == {
        (turn, "llm"): ("llm", 0),
        (turn, "story"): ("story", 0),
        (conditioning, "vokens"): (turn, 2),
        (conditioning, "mapper"): ("mapper", 0),
        (conditioning, "model"): ("model", 0),
        (sampler, "model"): ("model", 0),
        (sampler, "positive"): (conditioning, 0),
        (sampler, "negative"): (conditioning, 1),
        (sampler, "latent_image"): (latent, 0),
        (decode, "samples"): (sampler, 0),
        (decode, "vae"): ("vae", 0),
        (picture, "story"): (turn, 0),
        (picture, "image"): (decode, 0),
        (parts, "story"): (picture, 0),
    }


def test_each_scene_goes_on_from_the_one_before(expand):
    answer = expand(scenes=3)
    pictured = [[name, 0] for name in of_class(answer.expand, "MiniGPT5AddPicture")]
    assert column(answer.expand, "MiniGPT5StoryTurn", "story") == [["story", 0], *pictured[:-1]]
    (parts,) = of_class(answer.expand, "MiniGPT5StoryParts")
    assert answer.args == (pictured[-1], [parts, 1], [parts, 2])


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, [0, 1, 2]), (2**63, [2**63, 2**63 + 1, 2**63 + 2]), (LAST - 1, [LAST - 1, LAST, 0])],
)
@pytest.mark.parametrize("class_type", ["MiniGPT5StoryTurn", "KSampler"])
def test_each_scene_takes_the_next_seed_and_after_the_last_comes_0(expand, class_type, seed, expected):
    assert column(expand(scenes=3, seed=seed).expand, class_type, "seed") == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", ["", "", ""]),
        ("It snows.", ["It snows.", "", ""]),
        ("It snows.\n\nNight falls.", ["It snows.", "", "Night falls."]),
        ("a\r\nb\nc\nd\n", ["a", "b", "c"]),
    ],
)
def test_each_scene_gets_its_line(expand, lines, expected):
    assert column(expand(scenes=3, instructions=lines).expand, "MiniGPT5StoryTurn", "instruction") == expected


def test_every_setting_arrives(expand):
    turn = {"temperature": 0.5, "top_p": 0.8, "top_k": 9, "repetition_penalty": 1.2, "max_new_tokens": 33}
    sampler = {"steps": 7, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple"}
    graph = expand(**turn, **sampler, width=64, height=96).expand
    for class_type, settings in (("MiniGPT5StoryTurn", turn), ("KSampler", sampler)):
        for inputs in of_class(graph, class_type).values():
            assert settings.items() <= inputs.items()
    assert list(of_class(graph, "EmptyLatentImage").values()) == [
        {"width": 64, "height": 96, "batch_size": 1}
    ]
    assert column(graph, "MiniGPT5StoryTurn", "pictures") == ["after_text"] * 2
    assert column(graph, "KSampler", "denoise") == [1.0] * 2


def test_a_latent_of_the_users_own_takes_the_empty_ones_place(expand):
    graph = expand(latent=["mine", 0]).expand
    assert not of_class(graph, "EmptyLatentImage")
    assert column(graph, "KSampler", "latent_image") == [["mine", 0]] * 2


def test_a_node_of_a_scene_gets_inputs_that_it_has_and_all_that_it_needs(pack, expand):
    for node in expand().expand.values():
        name, given = node["class_type"], set(node["inputs"])
        if name in CORE:
            assert given == CORE[name]
            continue
        assert given <= {end.id for end in pack.nodes[name].GET_SCHEMA().inputs}
        inspect.signature(pack.nodes[name].execute).bind(**node["inputs"])


def changed(before, after):
    return [name.rsplit(".", 1)[-1] for name in after if after[name] != before.get(name)]


def test_a_scene_more_leaves_those_before_as_they_were(expand):
    added = changed(expand(scenes=2).expand, expand(scenes=3).expand)
    assert added == [
        *(f"scene_3_{part}" for part in ("turn", "conditioning", "sampler", "decode", "picture")),
        "parts",
    ]


def test_another_line_touches_its_own_turn_alone(expand):
    before, after = (expand(instructions=lines).expand for lines in ("a\nb", "a\nc"))
    assert changed(before, after) == ["scene_2_turn"]  # what follows from it is computed anew by its link
