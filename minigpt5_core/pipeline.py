"""A story from end to end: the LLM writes, its vokens go through the mapper, a diffusers pipeline draws.

teller = load(Parts())
for scene in teller.tell(Story("Mia the fox wakes up in a snowy forest.", seed=0), scenes=4):
    print(scene.text); scene.picture.save(...)
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .conditioning.mapper import Mapper
from .conditioning.mapper_file import MapperHeader, load_mapper
from .diffusion import (
    DIFFUSION_PRECISIONS,
    check_diffusion,
    find_diffusion,
    load_diffusion,
    prompt_arguments,
    space_of,
)
from .errors import BadInputError, CancelledError
from .generate.cache import StoryCache
from .generate.decode import generate
from .generate.row import Reply
from .generate.sampling import seeded_generator
from .llm.files import default_llm
from .llm.frozen import FrozenLLM
from .llm.load import load_adapter, load_llm, load_vision
from .llm.precision import dtype_and_quantization
from .llm.weights import hash_weights
from .story.presets import STORYBOOK as STORYBOOK_PRESET  # the folder has that name here
from .story.presets import Preset
from .story.prompts import LOOK, NEXT, Turn, fit_prompt
from .story.story import Story
from .story.storybook import STORYBOOK, unknown_words
from .vision.image_adapter import IMAGE_ADAPTER
from .vision.pictures import picture_tensor

__all__ = [
    "DIFFUSION_PRECISIONS",
    "STORYBOOK",
    "OnProgress",
    "Parts",
    "StoryTeller",
    "ToldScene",
    "check_device",
    "check_diffusion",
    "find_diffusion",
    "load",
    "load_diffusion",
    "prompt_arguments",
    "space_of",
]

log = logging.getLogger("minigpt5")

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Parts:
    """What a story is told with; None stands for the storybook's own part.

    The storybook's image adapter is used with the storybook's adapter only. `llm` is a Hugging Face folder or a GGUF
    file, `llm_precision` one of `precision.PRECISIONS`. `diffusion_precision`, "float32" or "bf16", is the dtype of the
    diffusion model; bf16 takes half the memory.
    """

    llm: Path | None = None
    adapter: Path | None = None
    mapper: Path | None = None
    diffusion: Path | None = None
    device: str | None = None
    image_adapter: Path | None = None
    llm_precision: str = "float32"
    diffusion_precision: str = "float32"


@dataclass(frozen=True)
class ToldScene:
    """One new scene; `picture` is None when the reply asked for none.

    `dropped` are earlier scenes (counted from 1) that no longer fit the LLM's context.
    """

    text: str
    picture: Image.Image | None
    dropped: tuple[int, ...] = ()


class StoryTeller:
    """A frozen LLM, a mapper and a diffusers pipeline that fit each other."""

    def __init__(
        self,
        llm: FrozenLLM,
        mapper: Mapper,
        diffusion: DiffusionPipeline,
        draws_storybook: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.llm, self.mapper, self.diffusion = llm, mapper, diffusion
        self.draws_storybook = draws_storybook
        self.on_progress = on_progress or (lambda stage, done, total: None)

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the storybook cannot draw, in order; none for other diffusion models."""
        return unknown_words(prompt) if self.draws_storybook else []

    def tell(
        self,
        story: Story,
        scenes: int = 4,
        steps: int | None = None,
        guidance: float | None = None,
        preset: Preset = STORYBOOK_PRESET,
        pictures: Sequence[Image.Image | None] = (),
    ) -> Iterator[ToldScene]:
        """Yields `scenes` new scenes after those that the story already holds; scene i is made with seed + i.

        `preset` words the story, and gives the diffusion `steps` and the `guidance` of a picture where these are None.
        A reply with several pictures becomes several scenes. `pictures` are those of the scenes that the story holds.
        An LLM with vision is shown every picture, also those it asked for itself; another LLM knows a picture by its
        voken block alone. Raises BadInputError for an opening that does not fit the LLM's context.
        """
        steps = preset.steps if steps is None else steps
        guidance = preset.guidance if guidance is None else guidance
        turns = self._earlier(story, pictures, preset)
        last, cache = len(turns) + scenes, StoryCache()
        while (index := len(turns)) < last:
            asked = Turn(NEXT if index else story.prompt)
            reply, dropped = self._write([*turns, asked], preset, (story.seed + index) % 2**64, cache)
            told = preset.told(self.llm, [*turns, asked], reply)
            most = min(preset.sampling.max_pictures, last - index)
            for text, states in replace(reply, text=told).scenes(most):
                seed = (story.seed + len(turns)) % 2**64
                picture = None if states is None else self._draw(states[None], seed, steps, guidance)
                seen = None if picture is None else preset.see(self.llm, picture_tensor(picture))
                turns.append(replace(asked, text=text, picture=picture is not None, image_tokens=seen))
                yield ToldScene(text, picture, tuple(turn + 1 for turn in dropped))
                asked, dropped = Turn(NEXT), ()

    def _earlier(self, story: Story, pictures: Sequence[Image.Image | None], preset: Preset) -> list[Turn]:
        """The story's scenes as the LLM reads them, with their pictures behind their voken blocks if it has vision."""
        turns = []
        for index, (scene, picture) in enumerate(zip_longest(story.scenes, pictures[: len(story.scenes)])):
            seen = None if picture is None else preset.see(self.llm, picture_tensor(picture))
            request = NEXT if index else story.prompt or LOOK
            turns.append(Turn(request, scene.text, scene.picture is not None, seen))
        return turns

    def _write(
        self, turns: list[Turn], preset: Preset, seed: int, cache: StoryCache
    ) -> tuple[Reply, tuple[int, ...]]:
        sampling = preset.sampling_for(self.llm, turns)
        room = sampling.max_new_tokens + sampling.max_pictures * len(self.llm.voken_ids)
        fitted = fit_prompt(self.llm, turns, room, preset.wording_for(self.llm))
        ticks = iter(range(1, room + 1))
        reply = generate(
            self.llm,
            [fitted.prompt],
            sampling,
            [seed],
            cache,
            lambda row: self.on_progress("writing", next(ticks), room),
        )[0]
        if reply.stopped == "cancelled":
            raise CancelledError
        self.on_progress("writing", room, room)
        return reply, fitted.dropped

    @torch.no_grad()
    def _draw(self, states: torch.Tensor, seed: int, steps: int, guidance: float) -> Image.Image:
        """A picture of voken states (1, V, L)."""
        positive, negative = self.mapper(states.float()), self.mapper.negative()

        def tick(pipeline: DiffusionPipeline, step: int, timestep: object, tensors: dict) -> dict:
            self.on_progress("drawing", step + 1, steps)
            return tensors

        return self.diffusion(
            **prompt_arguments(positive, negative, self.diffusion.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeded_generator(seed),
            callback_on_step_end=tick,
        ).images[0]


def load(parts: Parts | None = None, on_progress: OnProgress | None = None) -> StoryTeller:
    """Loads the parts and checks that they fit each other; BadInputError says which do not, and what to load."""
    parts = parts or Parts()
    tick = on_progress or (lambda stage, done, total: None)
    device = parts.device or "cpu"
    check_device(device)
    mapper_file = parts.mapper or STORYBOOK / "voken_mappers" / "storybook.safetensors"
    mapper, header = load_mapper(mapper_file)
    tick("loading", 1, 4)
    llm_folder = parts.llm or default_llm()
    llm = load_llm(
        llm_folder, mapper.config.vokens, device=device, **dtype_and_quantization(parts.llm_precision)
    )
    _check_llm(llm, llm_folder, header, mapper_file)
    tick("loading", 2, 4)
    llm = load_adapter(llm, parts.adapter or STORYBOOK / "loras" / "storybook")
    # the storybook's image adapter was trained through the storybook's adapter
    spare = STORYBOOK / "LLM" / IMAGE_ADAPTER if parts.adapter is None else None
    llm = load_vision(llm, llm_folder, spare, parts.image_adapter)
    tick("loading", 3, 4)
    diffusion = load_diffusion(parts.diffusion or STORYBOOK / "diffusers", device, parts.diffusion_precision)
    check_diffusion(diffusion, header, mapper_file)
    tick("loading", 4, 4)
    return StoryTeller(llm, mapper.to(device), diffusion, parts.diffusion is None, on_progress)


def check_device(name: str) -> None:
    """BadInputError unless torch can compute on the device `name`."""
    cure = "Give --device cpu, or leave --device out."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInputError(
            f"--device is {name!r}, which is no device; expected such as cpu or cuda. {cure}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInputError(f"--device is {name!r}, but torch finds no CUDA on this machine. {cure}")
    try:
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # an index too high, or a backend not built in
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(f"--device is {name!r}, which torch cannot compute on: {why} {cure}") from error


def _check_llm(llm: FrozenLLM, folder: Path, header: MapperHeader, file: Path) -> None:
    if llm.width != header.llm_width:
        raise BadInputError(
            f"The mapper {file.name} was trained for the LLM {header.llm_id} of width {header.llm_width}, but "
            f"{folder.name} is {llm.width} wide. Give that LLM with --llm, or a mapper for this one with --mapper."
        )
    if header.llm_hash not in ("", hash_weights(folder)):
        log.warning(
            "The mapper %s was trained with other weights of %s than those in %s; pictures may suffer.",
            file.name, header.llm_id, folder,
        )  # fmt: skip
