"""A whole story in one node: it becomes a chain of the plain nodes, so that every scene is cached by itself."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .compat import link, schema
from .keeping import Keeper
from .sockets import LLM, MAPPER, STORY
from .turn import PICTURES_TOO, SEEDS, llm_reads_input, preset_input, sampling_inputs

SIZE = "In pixels: 128 for the storybook, which draws nonsense at other sizes; 512 for SD 1.5, 1024 for SDXL."


class Interleaver(io.ComfyNode):
    """Text and pictures in turn, for a number of scenes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        import comfy.samplers

        return schema(
            node_id="MiniGPT5Interleaver",
            display_name="Interleaver (MiniGPT-5)",
            category="MiniGPT-5",
            description="Tells and draws a number of scenes. Only what an edit touches is told and drawn again.",
            search_aliases=["story", "comic", "interleaved", "picture book"],
            enable_expand=True,
            inputs=[
                link(LLM, "llm", display_name="LLM"),
                link(MAPPER, "mapper"),
                link(
                    io.Model, "model", tooltip="Draws; checked against the mapper before the first picture."
                ),
                link(io.Vae, "vae"),
                link(STORY, "story", tooltip="The opening, or a story to go on with."),
                io.Int.Input("scenes", default=4, min=1, max=100, tooltip="How many scenes to tell."),
                io.String.Input(
                    "instructions",
                    multiline=True,
                    default="",
                    placeholder="One line a scene, such as\nIt snows.\nMia finds a key.\nNight falls.",
                    tooltip="One line a scene: a hint at what should happen in it, which a small LLM may take its own "
                    "way. An empty line leaves it to the LLM; lines beyond the last scene wait.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS,
                    control_after_generate=True,
                    tooltip="The first scene's; each later one takes the next number.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=1000, tooltip="Sampling steps of every picture."
                ),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the vokens steer: 3 to 5 for the storybook, about 7 for Stable Diffusion.",
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="dpmpp_2m"),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="karras"),
                io.Int.Input("width", default=128, min=16, max=16384, step=8, tooltip=SIZE),
                io.Int.Input("height", default=128, min=16, max=16384, step=8, tooltip=SIZE),
                *sampling_inputs(),
                link(
                    io.Latent,
                    "latent",
                    optional=True,
                    tooltip="An empty latent of your own, for models whose latents are not Stable Diffusion's; width "
                    "and height then do nothing.",
                ),
                preset_input(),
                llm_reads_input(),
            ],
            outputs=[
                STORY.Output("told", display_name="story"),
                io.Image.Output("images", display_name="images"),
                io.String.Output("text", display_name="text"),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        keeper = Keeper(graph, cls.hidden.dynprompt)
        story, size = inputs["story"], {"width": inputs["width"], "height": inputs["height"]}
        latent = inputs.get("latent") or graph.node("EmptyLatentImage", "latent", **size, batch_size=1).out(0)
        lines = inputs["instructions"].splitlines()
        for index in range(inputs["scenes"]):
            line = lines[index] if index < len(lines) else ""
            story = _scene(graph, keeper, index, line, story, latent, inputs)
        parts = graph.node("MiniGPT5StoryParts", "parts", story=story)
        return io.NodeOutput(story, parts.out(1), parts.out(2), expand=graph.finalize())


def _scene(
    graph: Any, keeper: Keeper, index: int, line: str, story: Any, latent: Any, inputs: dict[str, Any]
) -> Any:
    """The nodes of one scene, named by its number; returns the link to the story with the scene in it."""
    name = f"scene_{index + 1}"
    seed = (inputs["seed"] + index) & SEEDS
    sampling = {widget.id: inputs[widget.id] for widget in sampling_inputs()}
    turn = graph.node(
        "MiniGPT5StoryTurn",
        f"{name}_turn",
        llm=inputs["llm"],
        story=story,
        instruction=line,
        seed=seed,
        pictures="after_text",
        preset=inputs.get("preset", "off"),
        llm_reads=inputs.get("llm_reads", PICTURES_TOO),
        **sampling,
    )
    told, vokens = keeper.keep(f"{name}_told", story=turn.out(0), vokens=turn.out(2))
    conditioning = graph.node(
        "MiniGPT5VokensToConditioning",
        f"{name}_conditioning",
        vokens=vokens,
        mapper=inputs["mapper"],
        picture=1,
        model=inputs["model"],
    )
    drawn = graph.node(
        "KSampler",
        f"{name}_sampler",
        model=inputs["model"],
        seed=seed,
        steps=inputs["steps"],
        cfg=inputs["cfg"],
        sampler_name=inputs["sampler_name"],
        scheduler=inputs["scheduler"],
        positive=conditioning.out(0),
        negative=conditioning.out(1),
        latent_image=latent,
        denoise=1.0,
    )
    decoded = graph.node("VAEDecode", f"{name}_decode", samples=drawn.out(0), vae=inputs["vae"])
    # turn and picture are shown on the Interleaver itself while the rest is still being told
    pictured = graph.node("MiniGPT5AddPicture", f"{name}_picture", story=told, image=decoded.out(0))
    return keeper.keep(f"{name}_kept", story=pictured.out(0))[0]
