"""Saved workflows know inputs, widgets and outputs by their places, so that new ones may only come at the end.

tests/node_inputs.json is the record. The shared workflows are held against the nodes here too, without ComfyUI.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

RECORD = Path(__file__).parent / "node_inputs.json"
WORKFLOWS = sorted((Path(__file__).parents[1] / "workflows").glob("*.json"))
NOTES = {"MarkdownNote", "Note"}
# ComfyUI's own nodes that the workflows use: what may be linked, and what comes out.
CORE = {
    "CheckpointLoaderSimple": ({}, ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "STRING"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({}, ["LATENT"]),
    "KSampler": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
        },
        ["LATENT"],
    ),
    "LoadImage": ({}, ["IMAGE", "MASK"]),
    "LossGraphNode": ({"loss": "LOSS_MAP"}, []),
    "PreviewAny": ({"source": "*"}, ["STRING"]),
    "PreviewImage": ({"images": "IMAGE"}, []),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
}
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "COMBO": str}


@pytest.fixture
def schemas(pack):
    return {name: node.GET_SCHEMA() for name, node in pack.nodes.items()}


def is_widget(end):
    return hasattr(end, "default")


def widgets(schema):
    """Widgets as the browser puts them: those that are needed first; behind a seed, what becomes of it."""
    found = []
    for end in sorted(filter(is_widget, schema.inputs), key=lambda end: end.optional):
        found.append(end.id)
        if getattr(end, "control_after_generate", None):
            found.append("control_after_generate")
    return found


def places(schema):
    """What a saved workflow counts on."""
    return {
        "inputs": [f"{end.id} {end.io_type}" for end in schema.inputs],
        "widgets": widgets(schema),
        "outputs": [f"{end.id} {end.io_type}" for end in schema.outputs],
    }


def as_text(record):
    """A line for each list, so that a change shows as one."""
    nodes = [
        f'  "{name}": {{\n'
        + ",\n".join(f'    "{key}": {json.dumps(values)}' for key, values in node.items())
        + "\n  }"
        for name, node in record.items()
    ]
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def shifted(recorded, present):
    """What is not where the record has it."""
    return [
        f"{name}: {key} are {present.get(name, {}).get(key)}, saved workflows count on {values} first"
        for name, node in recorded.items()
        for key, values in node.items()
        if present.get(name, {}).get(key, [])[: len(values)] != values
    ]


@pytest.fixture
def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_inputs_widgets_and_outputs_keep_their_places(schemas, recorded):
    moved = shifted(recorded, {name: places(schema) for name, schema in schemas.items()})
    assert not moved, "Put new inputs and outputs behind the others.\n" + "\n".join(moved)


def test_the_record_is_complete(schemas, recorded):
    present = {name: places(schema) for name, schema in schemas.items()}
    assert recorded == present, f"Put this into {RECORD}:\n{as_text(present)}"


@pytest.mark.parametrize("key", ["inputs", "widgets", "outputs"])
def test_a_place_that_was_taken_is_noticed_and_one_at_the_end_is_not(recorded, key):
    present = json.loads(json.dumps(recorded))
    present["MiniGPT5Interleaver"][key].append("new")
    assert not shifted(recorded, present)
    present["MiniGPT5Interleaver"][key].insert(1, "new")
    (said,) = shifted(recorded, present)
    assert said.startswith(f"MiniGPT5Interleaver: {key} are [")


# The shared workflows


@pytest.fixture(params=WORKFLOWS, ids=lambda file: file.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def nodes_of(workflow):
    return {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}


def sockets(node, schemas):
    """({input that may be linked: type}, [types of outputs]) of one node."""
    if node["type"] in CORE:
        return CORE[node["type"]]
    schema = schemas[node["type"]]
    return {end.id: end.io_type for end in schema.inputs}, [end.io_type for end in schema.outputs]


def linked(node):
    return {entry["name"]: entry["link"] for entry in node["inputs"] if entry.get("link") is not None}


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 7


def test_every_node_of_a_workflow_is_known(schemas, workflow):
    assert {node["type"] for node in workflow["nodes"]} <= set(schemas) | set(CORE) | NOTES


def test_a_workflow_says_what_it_is_for(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert len(note["widgets_values"][0]) > 100


def test_numbers_of_nodes_and_links_are_used_once(workflow):
    for numbers, last in (
        ([node["id"] for node in workflow["nodes"]], workflow["last_node_id"]),
        ([link[0] for link in workflow["links"]], workflow["last_link_id"]),
    ):
        assert len(set(numbers)) == len(numbers)
        assert max(numbers) <= last  # the browser counts on from there


def test_a_nodes_sockets_are_those_that_it_has(schemas, workflow):
    for node in nodes_of(workflow).values():
        inputs, outputs = sockets(node, schemas)
        shown = {entry["name"]: entry["type"] for entry in node["inputs"]}
        assert shown.items() <= inputs.items(), node["type"]
        put_out = [entry["type"] for entry in node["outputs"]]
        assert put_out == outputs[: len(put_out)], node["type"]


def test_every_link_joins_an_output_to_an_input_of_its_type_and_both_know_of_it(workflow):
    nodes = nodes_of(workflow)
    for number, origin, slot, target, place, kind in workflow["links"]:
        begin, end = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert begin["type"] == kind and end["type"] in (kind, "*")
        assert number in begin["links"]
        assert end["link"] == number


def test_no_socket_knows_of_a_link_that_is_not_there(workflow):
    nodes = nodes_of(workflow).values()
    arriving = Counter(link for node in nodes for link in linked(node).values())
    leaving = Counter(
        link for node in nodes for entry in node["outputs"] for link in entry.get("links") or []
    )
    assert arriving == leaving == Counter(link[0] for link in workflow["links"])


def test_every_input_that_is_needed_is_linked(schemas, workflow):
    for node in nodes_of(workflow).values():
        if node["type"] in CORE:
            needed = set(CORE[node["type"]][0]) - {"text"}  # which has a widget
        else:
            ends = schemas[node["type"]].inputs
            needed = {end.id for end in ends if not is_widget(end) and not end.optional}
        assert needed <= set(linked(node)), node["type"]


def test_a_workflow_has_a_value_that_fits_for_every_widget(schemas, workflow):
    for node in nodes_of(workflow).values():
        if node["type"] in CORE:
            continue
        schema, values = schemas[node["type"]], node["widgets_values"]
        names = widgets(schema)
        assert len(values) == len(names), node["type"]
        ends = {end.id: end for end in schema.inputs}
        for name, value in zip(names, values, strict=True):
            assert fits(ends.get(name), value), (node["type"], name, value)


def fits(widget, value):
    """Whether a widget takes the value; files of the user's are not here, so names of files always fit."""
    if widget is None:  # what becomes of the seed
        return value in ("fixed", "increment", "decrement", "randomize")
    if not isinstance(value, TYPES[widget.io_type]) or isinstance(value, bool):
        return False
    if widget.io_type in ("INT", "FLOAT"):
        return widget.min <= value <= widget.max
    return widget.io_type != "COMBO" or widget.id.endswith("_name") or value in widget.options
