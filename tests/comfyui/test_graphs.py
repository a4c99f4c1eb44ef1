"""Our nodes in other people's graphs, on a real ComfyUI server."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from .test_server import scenes_that_ran

SHIPPED = Path(__file__).parents[2] / "storybook" / "voken_mappers" / "storybook.safetensors"
NAMES = [
    ("llm", "llm_name", "SmolLM2-135M-Instruct"),
    ("adapter", "adapter_name", "storybook"),
    ("mapper", "mapper_name", "storybook.safetensors"),
    ("diffusion", "model_name", "storybook"),
]


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


# Names that come over a link


@pytest.fixture
def link_name(server):
    """link_name(prompt, node, input, value): the value comes out of a text node, through a switch."""
    if "ComfySwitchNode" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no switch")

    def link(prompt, name, key, value):
        text, switch = f"{name}_text", f"{name}_switch"
        prompt[text] = node("PrimitiveString", value=value)
        prompt[switch] = node("ComfySwitchNode", switch=True, on_true=[text, 0], on_false=[text, 0])
        prompt[name]["inputs"][key] = [switch, 0]

    return link


def test_every_loader_takes_its_name_over_a_link_and_the_scene_is_kept(server, graph, link_name):
    prompt = graph(scenes=1, seed=301)
    plain = server.run(prompt)
    for name, key, value in NAMES:
        link_name(prompt, name, key, value)
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert result.outputs["view"]["minigpt5_pages"] == plain.outputs["view"]["minigpt5_pages"]
    assert scenes_that_ran(result) == [1]
    assert server.run(prompt).ran == []
    prompt["interleaver"]["inputs"]["scenes"] = 2
    assert scenes_that_ran(server.run(prompt)) == [2]


@pytest.mark.parametrize(("name", "key", "value"), NAMES)
def test_a_wrong_name_over_a_link_is_refused_by_the_loader(server, graph, link_name, name, key, value):
    prompt = graph(scenes=1, seed=302)
    link_name(prompt, name, key, "nowhere")
    result = server.run(prompt)
    assert result.status == "error"
    assert "'nowhere' is in none of these folders" in result.error
    assert "None" not in result.error
    assert result.ran[-1] == name


def test_a_story_is_loaded_by_a_name_over_a_link(server, graph, link_name):
    told = server.run(graph(scenes=1, seed=303))
    prompt = {"story": node("MiniGPT5LoadStory"), "view": node("MiniGPT5ViewStory", story=["story", 0])}
    link_name(prompt, "story", "story_name", told.outputs["save"]["images"][0]["subfolder"])
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert result.outputs["view"]["text"] == told.outputs["view"]["text"]
    link_name(prompt, "story", "story_name", "nowhere")
    assert "no saved story 'nowhere'" in server.run(prompt).error


def test_a_file_that_was_replaced_behind_a_linked_name_is_read_again(server, graph, link_name):
    mapper = server.base / "models" / "voken_mappers" / "linked.safetensors"
    mapper.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SHIPPED, mapper)
    prompt = graph(scenes=1, seed=304)
    link_name(prompt, "mapper", "mapper_name", mapper.name)
    assert "mapper" in server.run(prompt).ran
    assert server.run(prompt).ran == []
    shutil.copyfile(SHIPPED, f"{mapper}.new")
    Path(f"{mapper}.new").replace(mapper)
    assert "mapper" in server.run(prompt).ran


def test_choices_and_texts_over_links(server, graph, link_name):
    prompt = graph(scenes=1, seed=305)
    link_name(prompt, "llm", "dtype", "float32")
    link_name(prompt, "interleaver", "sampler_name", "euler")
    result = server.run(prompt)
    assert result.status == "success", result.error
    link_name(prompt, "llm", "dtype", "float8")
    assert "dtype is 'float8'; expected one of auto, float32" in server.run(prompt).error


# Several pictures in one turn


def picture_of(graph, number, story):
    """A graph of one picture of the turn, put into a story: the link to the story with it."""
    graph |= {
        f"conditioning{number}": node(
            "MiniGPT5VokensToConditioning", vokens=["turn", 2], mapper=["mapper", 0], picture=number, text_strength=0.3
        ),
        f"sampler{number}": node(
            "KSampler", model=["diffusion", 0], seed=number, steps=2, cfg=3.0, sampler_name="euler", scheduler="karras",
            positive=[f"conditioning{number}", 0], negative=[f"conditioning{number}", 1], latent_image=["latent", 0],
            denoise=1.0,
        ),
        f"decode{number}": node("VAEDecode", samples=[f"sampler{number}", 0], vae=["diffusion", 2]),
        f"picture{number}": node("MiniGPT5AddPicture", story=story, image=[f"decode{number}", 0]),
    }  # fmt: skip
    return [f"picture{number}", 0]


@pytest.fixture
def by_hand(graph):
    """by_hand(seed, ...) -> loaders, a turn and a latent."""

    def build(seed, batch_size=1, **changes):
        whole = graph()
        sampling = {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 50,
            "repetition_penalty": 1.0,
            "max_new_tokens": 24,
        }
        parts = {name: whole[name] for name in ("llm", "adapter", "mapper", "diffusion", "story")}
        turn = {"instruction": "", "seed": seed, "pictures": "after_text"} | sampling | changes
        parts["turn"] = node("MiniGPT5StoryTurn", llm=["adapter", 0], story=["story", 0], **turn)
        parts["latent"] = node("EmptyLatentImage", width=128, height=128, batch_size=batch_size)
        return parts

    return build


def test_two_pictures_of_one_turn_are_both_in_the_story(server, by_hand):
    # at this temperature the storybook's LLM, which was trained to ask for one, sometimes asks for more
    wild = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 100, "max_pictures": 2}
    for seed in range(3, 40):
        prompt = by_hand(seed, **wild)
        second = picture_of(prompt, 2, picture_of(prompt, 1, ["turn", 0]))
        prompt["view"] = node("MiniGPT5ViewStory", story=second)
        result = server.run(prompt)
        if result.status == "success":
            break
        assert "This turn has 1 picture(s); picture is set to 2" in result.error
    first, second = result.outputs["view"]["minigpt5_pages"]
    assert first["picture"] and second["picture"] and first["picture"] != second["picture"]
    prompt["view"]["inputs"]["story"] = ["picture1", 0]
    (alone,) = server.run(prompt).outputs["view"]["minigpt5_pages"]
    assert alone["picture"] == first["picture"] and alone["text"].startswith(first["text"])


# Around the vokens' conditioning


def drawn(server, prompt, positive=("conditioning1", 0)):
    """How many pictures came, by the story's one page and by the preview of all, and that preview's first."""
    prompt["sampler1"]["inputs"]["positive"] = list(positive)
    prompt |= {
        "view": node("MiniGPT5ViewStory", story=["picture1", 0]),
        "all": node("PreviewImage", images=["decode1", 0]),
    }
    result = server.run(prompt)
    assert result.status == "success", result.error
    (page,) = result.outputs["view"]["minigpt5_pages"]
    files = result.outputs["all"]["images"]
    with Image.open(server.base / "temp" / page["picture"]["filename"]) as picture:
        return page, len(files), picture.convert("RGB").tobytes()


def test_of_a_batch_of_latents_all_are_drawn_and_the_first_is_on_the_page(server, by_hand):
    one, batch = by_hand(311), by_hand(311, batch_size=3)
    for prompt in (one, batch):
        picture_of(prompt, 1, ["turn", 0])
    page, count, _ = drawn(server, batch)
    assert count == 3 and page["note"] == "3 pictures were drawn; the page has the first."
    page, count, _ = drawn(server, one)
    assert count == 1 and "note" not in page


def test_an_interleaver_draws_by_a_batch_of_latents(server, graph):
    prompt = graph(scenes=2, seed=312)
    prompt["batch"] = node("EmptyLatentImage", width=128, height=128, batch_size=2)
    prompt["interleaver"]["inputs"]["latent"] = ["batch", 0]
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert [page["note"] for page in result.outputs["view"]["minigpt5_pages"]] == [
        "2 pictures were drawn; the page has the first."
    ] * 2


OURS, TEXT = ["conditioning1", 0], ["text", 0]
MIXED = {
    "combine": node("ConditioningCombine", conditioning_1=OURS, conditioning_2=TEXT),
    "average": node(
        "ConditioningAverage", conditioning_to=OURS, conditioning_from=TEXT, conditioning_to_strength=0.5
    ),
    "average of text": node(
        "ConditioningAverage", conditioning_to=TEXT, conditioning_from=OURS, conditioning_to_strength=0.5
    ),
    "concat": node("ConditioningConcat", conditioning_to=OURS, conditioning_from=TEXT),
    "concat behind text": node("ConditioningConcat", conditioning_to=TEXT, conditioning_from=OURS),
    "area": node(
        "ConditioningSetArea", conditioning=OURS, width=64, height=128, x=64, y=0, strength=1.0
    ),
    "timesteps": node("ConditioningSetTimestepRange", conditioning=OURS, start=0.0, end=0.5),
}  # fmt: skip


@pytest.fixture
def mixing(by_hand):
    """A picture by hand, with an encoded text beside the vokens."""
    prompt = by_hand(313)
    picture_of(prompt, 1, ["turn", 0])
    prompt["text"] = node("CLIPTextEncode", clip=["diffusion", 1], text="a lion on the beach by day")
    return prompt


@pytest.mark.parametrize("name", MIXED)
def test_comfyuis_own_conditioning_nodes_take_ours(server, mixing, name):
    plain = drawn(server, mixing)[2]
    mixing["mixed"] = MIXED[name]
    assert drawn(server, mixing, ("mixed", 0))[2] != plain


def test_a_mixed_text_is_blended_in_entry_by_entry(server, mixing):
    """What Combine made of two, one of them for an area."""
    mixing |= {
        "other": node("CLIPTextEncode", clip=["diffusion", 1], text="a fox in the snow"),
        "part": node("ConditioningSetArea", conditioning=["other", 0], width=64, height=64, x=0, y=0, strength=1.0),
        "both": node("ConditioningCombine", conditioning_1=["text", 0], conditioning_2=["part", 0]),
    }  # fmt: skip
    mixing["conditioning1"]["inputs"]["text"] = ["both", 0]
    drawn(server, mixing)


# Several Interleavers, and one in a subgraph


def renamed(prompt, names):
    """The prompt with other node ids."""
    return {
        names[key]: node(
            one["class_type"],
            **{
                name: [names[value[0]], value[1]] if isinstance(value, list) else value
                for name, value in one["inputs"].items()
            },
        )
        for key, one in prompt.items()
    }


def pages_of(server, prompt, view="view"):
    result = server.run(prompt)
    assert result.status == "success", result.error
    return result.outputs[view]["minigpt5_pages"]


def test_two_interleavers_in_one_graph_tell_what_each_tells_alone(server, graph):
    first, other = graph(scenes=2, seed=321), graph(scenes=2, seed=321, temperature=1.2)
    both = first | {
        "interleaver2": other["interleaver"],
        "view2": node("MiniGPT5ViewStory", story=["interleaver2", 0]),
    }
    result = server.run(both)
    assert result.status == "success", result.error
    told = [result.outputs[view]["minigpt5_pages"] for view in ("view", "view2")]
    assert told[0] != told[1]
    server.free()
    assert [pages_of(server, first), pages_of(server, other)] == told


def test_an_interleaver_goes_on_from_another(server, graph):
    prompt = graph(scenes=1, seed=322)
    more = graph(scenes=2, seed=323)["interleaver"]
    more["inputs"]["story"] = ["interleaver", 0]
    prompt |= {"more": more, "view2": node("MiniGPT5ViewStory", story=["more", 0])}
    result = server.run(prompt)
    assert result.status == "success", result.error
    first, whole = (result.outputs[view]["minigpt5_pages"] for view in ("view", "view2"))
    assert len(whole) == 3 and whole[:1] == first
    more["inputs"]["scenes"] = 3
    assert scenes_that_ran(server.run(prompt)) == [3]


def test_an_interleaver_in_a_subgraph_keeps_its_scenes_and_those_of_before(server, graph):
    """The browser flattens subgraphs: what is in node 7 of them, in node 3 of that, is 7:3:ID."""
    prompt = graph(scenes=1, seed=324)
    plain = pages_of(server, prompt)
    inside = renamed(prompt, {name: f"7:3:{number}" for number, name in enumerate(prompt)})
    view = next(name for name, one in inside.items() if one["class_type"] == "MiniGPT5ViewStory")
    interleaver = next(one for one in inside.values() if one["class_type"] == "MiniGPT5Interleaver")
    for scenes in (2, 3):
        interleaver["inputs"]["scenes"] = scenes
        assert scenes_that_ran(result := server.run(inside)) == [scenes]
    assert result.outputs[view]["minigpt5_pages"][:1] == plain
