"""One turn: the LLM tells the next scene, and its vokens say what the picture shows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import folders
from .choices import check_choice
from .compat import schema
from .preview import show_notes, told_so_far
from .sockets import LLM, STORY, VOKENS, LoadedLLM, Page, StorySoFar, Vokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..minigpt5_core.generate import Sampling
    from ..minigpt5_core.generate.row import Reply
    from ..minigpt5_core.story.presets import Preset
    from ..minigpt5_core.story.prompts import Turn

log = logging.getLogger("minigpt5")

PICTURES = ["after_text", "when_asked", "first", "none"]
PRESETS = ["off", "default", "published_vist", "published_mmdialog", "published_cc3m"]
PICTURES_TOO, WORDS_ONLY = LLM_READS = ["pictures_too", "words_only"]
SEEDS = 0xFFFFFFFFFFFFFFFF


def sampling_inputs() -> list[io.Input]:
    """How tokens are sampled; the same widgets in Story Turn and Interleaver."""
    return [
        io.Float.Input(
            "temperature",
            default=0.7,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="0 takes the likeliest word; higher is more daring.",
        ),
        io.Float.Input("top_p", default=0.9, min=0.05, max=1.0, step=0.05, tooltip="Nucleus sampling."),
        io.Int.Input("top_k", default=50, min=0, max=1000, tooltip="0 leaves top-k out."),
        io.Float.Input(
            "repetition_penalty",
            default=1.0,
            min=1.0,
            max=3.0,
            step=0.05,
            tooltip="Above 1, words that were said become less likely.",
        ),
        io.Int.Input(
            "max_new_tokens", default=60, min=1, max=4096, tooltip="The longest a turn may be, in tokens."
        ),
    ]


def preset_input() -> io.Input:
    """How the story is worded for the LLM; the same widget in Story Turn and Interleaver, behind the older ones."""
    return io.Combo.Input(
        "preset",
        optional=True,
        options=PRESETS,
        default="off",
        tooltip="off: temperature and the widgets below it count. Any other: its settings count in their place; "
        "published_* also address the LLM as the published MiniGPT-5 checkpoints were trained to be.",
    )


def llm_reads_input() -> io.Input:
    """Whether an LLM that sees is shown the pictures; the same widget in Story Turn and Interleaver."""
    return io.Combo.Input(
        "llm_reads",
        optional=True,
        options=LLM_READS,
        default=PICTURES_TOO,
        tooltip="words_only: an LLM that sees is not shown the story's pictures. For a checkpoint that draws otherwise "
        "than the pictures it learned to see by, such as your own checkpoint beside the storybook's LLM.",
    )


class StoryTurn(io.ComfyNode):
    """The LLM tells one scene."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5StoryTurn",
            display_name="Story Turn (MiniGPT-5)",
            category="MiniGPT-5",
            description="The LLM tells the next scene. Its text, and the vokens of its picture, come out.",
            search_aliases=["generate text", "chat", "LLM", "next scene"],
            inputs=[
                LLM.Input("llm", display_name="LLM", tooltip="From Load LLM, with Load Adapter behind it."),
                STORY.Input("story", tooltip="The story so far."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="A hint at what should happen next, which a small LLM may take its own way. "
                    "Empty: the LLM decides.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS,
                    control_after_generate=True,
                    tooltip="Another seed tells the scene another way.",
                ),
                *sampling_inputs(),
                io.Combo.Input(
                    "pictures",
                    options=PICTURES,
                    default="after_text",
                    tooltip="after_text: text, then always a picture. when_asked: the LLM decides. first: the picture "
                    "before any text, as published. none: text only.",
                ),
                io.Int.Input(
                    "max_pictures",
                    optional=True,
                    default=1,
                    min=1,
                    max=8,
                    tooltip="How many pictures one turn may ask for; Vokens to Conditioning takes them one by one.",
                ),
                preset_input(),
                llm_reads_input(),
            ],
            outputs=[
                STORY.Output("told", display_name="story"),
                io.String.Output("text", display_name="text"),
                VOKENS.Output("vokens", display_name="vokens"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        llm: LoadedLLM,
        story: StorySoFar,
        instruction: str,
        seed: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        max_new_tokens: int,
        pictures: str,
        max_pictures: int = 1,
        preset: str = "off",
        llm_reads: str = PICTURES_TOO,
    ) -> io.NodeOutput:
        import comfy.model_management as management
        import torch

        from ..minigpt5_core.generate import Sampling, generate
        from ..minigpt5_core.story.prompts import fit_prompt

        for widget, value, options in (
            ("pictures", pictures, PICTURES),
            ("preset", preset, PRESETS),
            ("llm_reads", llm_reads, LLM_READS),
        ):
            check_choice(widget, value, options)
        widgets = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
        way = _preset(preset, widgets, pictures, max_pictures)
        frozen = llm.frozen
        request = _request(story, instruction)
        note = _what_cannot_be_drawn(request) if folders.STORYBOOK_ADAPTER in llm.adapters else ""
        show_notes(story.with_page(Page(request, "", note=note)), cls.hidden.unique_id)
        room = way.sampling.max_new_tokens + max_pictures * len(frozen.voken_ids)
        sees = llm.has_vision and llm_reads != WORDS_ONLY
        if sees:  # encoding pictures takes the weights, and the length of the prompt is known only afterwards
            management.load_models_gpu(llm.patchers, force_full_load=True)
        turns = [*_turns(llm, story, way, sees), _open_turn(request)]
        fitted = fit_prompt(frozen, turns, room, way.wording_for(frozen))
        if fitted.dropped:
            left_out = ", ".join(str(page + 1) for page in fitted.dropped)
            log.warning(
                "The story is longer than what %s can read; it goes on without page %s.", llm.name, left_out
            )
        memory = cache_bytes(llm, min(fitted.prompt.length + room, frozen.context))
        management.load_models_gpu(llm.patchers, memory_required=memory, force_full_load=True)
        with torch.no_grad():
            sampling = way.sampling_for(frozen, turns)
            reply = generate(frozen, [fitted.prompt], sampling, [seed], on_token=_progress(room))[0]
        text = way.told(frozen, turns, reply)
        vokens = Vokens(reply.voken_states.float().cpu(), llm.name, llm.weights_hash)
        told = story if story.pages else replace(story, seed=seed)
        told = told.with_page(Page(request, text, told=True, note=note, parts=_parts(reply)))
        return io.NodeOutput(told, text, vokens, ui=told_so_far(told))


def _preset(name: str, widgets: Sampling, pictures: str, max_pictures: int) -> Preset:
    """The preset, or one of the widgets' values; when pictures come is always up to the node's own widgets."""
    from ..minigpt5_core.story.presets import PRESETS as presets
    from ..minigpt5_core.story.presets import Preset

    chosen = Preset(widgets) if name == "off" else presets[name]
    sampling = replace(chosen.sampling, pictures=pictures, max_pictures=max_pictures)
    return replace(chosen, sampling=sampling)


def _request(story: StorySoFar, instruction: str) -> str:
    """What the LLM is asked: the opening for the first page, then the instruction or what happens next."""
    from ..minigpt5_core.story.prompts import NEXT

    instruction = instruction.strip()
    if story.pages:
        return instruction or NEXT
    return f"{story.prompt} {instruction}".strip()


def _parts(reply: Reply) -> tuple[str, ...]:
    """The text of each picture, where a reply has several."""
    count = len(reply.voken_states)
    return tuple(text for text, _ in reply.scenes(count)) if count > 1 else ()


def _what_cannot_be_drawn(request: str) -> str:
    """A line that names the words outside the storybook's world, in the log too; or nothing."""
    from ..minigpt5_core.story.storybook import unknown_words

    words = unknown_words(request)
    if not words:
        return ""
    note = f"The storybook cannot draw these words: {', '.join(words)}. The story is told all the same."
    log.warning(note)
    return note


def _turns(llm: LoadedLLM, story: StorySoFar, way: Preset, sees: bool) -> list[Turn]:
    """The pages as the LLM reads them. The request of a page without one is the opening, or what happens next.

    An LLM that `sees` is shown every picture. A voken block stands for the pictures that an LLM asked for; to an LLM
    that does not, for all of them.
    """
    from ..minigpt5_core.story.prompts import LOOK, NEXT, Turn

    turns = []
    for index, page in enumerate(story.pages):
        looks = sees and page.picture is not None
        image_tokens = way.see(llm.frozen, page.picture) if looks else None
        block = page.picture is not None and (page.told or image_tokens is None)
        request = page.request or (NEXT if index else story.prompt or LOOK)
        turns.append(Turn(request, page.text, block, image_tokens))
    return turns


def _open_turn(request: str) -> Turn:
    from ..minigpt5_core.story.prompts import Turn

    return Turn(request)


def _progress(total: int) -> Callable[[int], bool]:
    """Advances ComfyUI's progress bar at every token, and raises when the user has pressed Cancel."""
    import comfy.model_management as management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def tick(row: int) -> bool:
        management.throw_exception_if_processing_interrupted()  # newer bars look ten times a second at most
        bar.update(1)
        return False

    return tick


def cache_bytes(llm: LoadedLLM, positions: int) -> int:
    """Bytes that the keys and values of so many positions take, so that ComfyUI frees as much."""
    config = llm.frozen.causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = llm.frozen.causal_lm.dtype.itemsize
    return 2 * config.num_hidden_layers * heads * head_size * positions * size
