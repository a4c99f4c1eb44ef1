"""The systems that an evaluation on a data set compares: each tells a story's scenes, with a picture for each."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from minigpt5_core.generate import Reply, Sampling, generate
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story.prompts import Turn, fit_prompt

from .chapters import Chapter
from .drawing import DrawSettings, System, draw_prompt, draw_vokens, scene_by_scene, voken_states

SYSTEMS = ("vokens", "two_stage", "oracle")


def by_vokens(
    teller: StoryTeller, settings: DrawSettings, sampling: Sampling, write: bool
) -> System[Chapter]:
    """Ours: one LLM pass gives the text, unless it is given, and the voken states that the picture is drawn from."""

    def draw(chapter: Chapter, seed: int) -> tuple[Image.Image, int, str]:
        text, tokens = chapter.scene.text, len(teller.llm.voken_ids)
        if write:
            reply = _reply(teller, chapter, sampling, seed)
            states, text, tokens = reply.voken_states[:1], reply.text, tokens + len(reply.ids) - 1
        else:
            states = voken_states(teller.llm, [*chapter.turns, Turn(chapter.request, text)])
        return draw_vokens(teller, settings, states, seed), tokens, text

    return lambda story, seed: scene_by_scene(story, seed, draw)


def two_stage(
    teller: StoryTeller, settings: DrawSettings, sampling: Sampling, write: bool
) -> System[Chapter]:
    """The usual way: the LLM's text, or the given one, goes through the diffusion model's own text encoder."""
    words_only = replace(sampling, pictures="none")

    def draw(chapter: Chapter, seed: int) -> tuple[Image.Image, int, str]:
        text, tokens = chapter.scene.text, 0
        if write:
            reply = _reply(teller, chapter, words_only, seed)
            text, tokens = reply.text, len(reply.ids)
        return draw_prompt(teller, settings, text, seed), tokens, text

    return lambda story, seed: scene_by_scene(story, seed, draw)


def oracle(teller: StoryTeller, settings: DrawSettings) -> System[Chapter]:
    """The ceiling: the true caption, or the true text where there is none, is drawn."""

    def draw(chapter: Chapter, seed: int) -> tuple[Image.Image, int, str]:
        prompt = chapter.scene.caption or chapter.scene.text
        return draw_prompt(teller, settings, prompt, seed), 0, chapter.scene.text

    return lambda story, seed: scene_by_scene(story, seed, draw)


def build_systems(
    names: Sequence[str], teller: StoryTeller, settings: DrawSettings, sampling: Sampling, write: bool
) -> dict[str, System[Chapter]]:
    """Those of SYSTEMS that `names` names. With `write` the LLM writes the texts; else all are given the true ones."""
    known: dict[str, System[Chapter]] = {
        "vokens": by_vokens(teller, settings, sampling, write),
        "two_stage": two_stage(teller, settings, sampling, write),
        "oracle": oracle(teller, settings),
    }
    return {name: system for name, system in known.items() if name in names}


def _reply(teller: StoryTeller, chapter: Chapter, sampling: Sampling, seed: int) -> Reply:
    room = sampling.max_new_tokens + len(teller.llm.voken_ids)
    fitted = fit_prompt(teller.llm, [*chapter.turns, Turn(chapter.request)], room)
    return generate(teller.llm, [fitted.prompt], sampling, [seed])[0]
