"""A story from end to end: the LLM writes, its vokens go through the mapper, a diffusers pipeline draws.

teller = load(Parts())
for scene in teller.tell(Story("Mia the fox wakes up in a snowy forest.", seed=0), scenes=4):
    print(scene.text); scene.picture.save(...)
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .conditioning import SPACES, Conditioning, Space, check_space
from .errors import BadInputError, CancelledError
from .generate import Reply, StoryCache, generate, seeded_generator
from .llm import FrozenLLM, load_adapter, load_llm, load_sight, reading
from .llm_files import default_llm
from .mapper import Mapper
from .model_index import check_index
from .precision import holding
from .presets import STORYBOOK as STORYBOOK_PRESET  # the folder has that name here
from .presets import Preset
from .prompts import LOOK, NEXT, Turn, fit_prompt
from .story import Story
from .storybook import STORYBOOK, unknown_words
from .vision import picture_tensor
from .weights import IMAGE_ADAPTER, MapperHeader, hash_weights, load_mapper

DIFFUSION_PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}

log = logging.getLogger("minigpt5")

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Parts:
    """What a story is told with; None stands for the storybook's own part. Its eyes go with its own adapter only.

    `llm` is a Hugging Face folder or a GGUF file, `llm_precision` one of `precision.PRECISIONS`.
    `diffusion_precision`, "float32" or "bf16", is how the diffusion model is held and draws; half the memory in bf16.
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
    """One scene as it was told; `picture` is None when the reply asked for none.

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
        """Yields `scenes` new scenes after those the story already holds; scene i draws with seed + i.

        `preset` words the story, and says how many `steps` and how much `guidance` a picture gets where these are
        None; a reply with several pictures becomes several scenes. `pictures` are those of the scenes the story holds.
        An LLM that sees is shown every picture, also those it asked for itself; to another a picture is known as the
        voken block it came from. Raises BadInputError for an opening that does not fit the LLM's context.
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
                shown = None if picture is None else preset.see(self.llm, picture_tensor(picture))
                turns.append(replace(asked, text=text, picture=picture is not None, shown=shown))
                yield ToldScene(text, picture, tuple(turn + 1 for turn in dropped))
                asked, dropped = Turn(NEXT), ()

    def _earlier(self, story: Story, pictures: Sequence[Image.Image | None], preset: Preset) -> list[Turn]:
        """The story's scenes as the LLM reads them, their pictures shown behind their blocks where it can see."""
        turns = []
        for index, (scene, picture) in enumerate(zip_longest(story.scenes, pictures[: len(story.scenes)])):
            shown = None if picture is None else preset.see(self.llm, picture_tensor(picture))
            request = NEXT if index else story.prompt or LOOK
            turns.append(Turn(request, scene.text, scene.picture is not None, shown))
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


def prompt_arguments(
    positive: Conditioning, negative: Conditioning, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What a diffusers pipeline of that precision takes in place of a prompt."""
    positive, negative = positive.to(dtype), negative.to(dtype)
    arguments = {"prompt_embeds": positive.tokens, "negative_prompt_embeds": negative.tokens}
    if positive.pooled is not None and negative.pooled is not None:
        arguments |= {
            "pooled_prompt_embeds": positive.pooled,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
    return arguments


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
    llm = load_llm(llm_folder, mapper.config.vokens, device=device, **holding(parts.llm_precision))
    _check_llm(llm, llm_folder, header, mapper_file)
    tick("loading", 2, 4)
    llm = load_adapter(llm, parts.adapter or STORYBOOK / "loras" / "storybook")
    # the storybook's eyes were trained through its own adapter
    spare = STORYBOOK / "LLM" / IMAGE_ADAPTER if parts.adapter is None else None
    llm = load_sight(llm, llm_folder, spare, parts.image_adapter)
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


def load_diffusion(folder: Path, device: str = "cpu", precision: str = "float32") -> DiffusionPipeline:
    """A diffusers folder or a name on the Hub (`find_diffusion`), in float32 or bf16 whatever its files hold.

    BadInputError when there is none, or not of whole safetensors files, or for another precision.

    Text encoders that were left out of it are None: a mapper answers in their place.
    """
    if precision not in DIFFUSION_PRECISIONS:
        raise BadInputError(
            f"diffusion_precision is {precision!r}; it can be {' or '.join(DIFFUSION_PRECISIONS)}."
        )
    folder = find_diffusion(folder)
    cure = "Pickled weights (.bin) are never read; save the pipeline as safetensors, in full precision."
    check_index(folder)
    with reading(f"The diffusion model in {folder} cannot be read", folder, cure):
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=DIFFUSION_PRECISIONS[precision],
            local_files_only=True,
            use_safetensors=True,
            **_left_out(folder),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_diffusion(folder: Path) -> Path:
    """`folder`; where there is none of that name, what `hf download` has fetched of the model of that name.

    Nothing is downloaded here. BadInputError when neither is there, or it is no diffusers model.
    """
    found, name = folder, folder.as_posix()
    named = not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", name)
    if named:
        with suppress(OSError, ValueError):  # ValueError: one that asks for code of its own
            found = Path(DiffusionPipeline.download(name, local_files_only=True))
    if (found / "model_index.json").is_file():
        return found
    cure = f", or fetch the model of that name: hf download {name}" if named else ""
    raise BadInputError(
        f"{folder} is no diffusers model folder (it has no model_index.json). Give a folder that a diffusers "
        f"pipeline was saved to{cure}."
    )


def _left_out(folder: Path) -> dict[str, None]:
    """The text encoders and tokenizers that the index names and the folder lacks, such as SD3's T5 of 9 GB."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name in index if name.startswith(("text_encoder", "tokenizer"))]
    return {name: None for name in parts if not (folder / name).is_dir()}


def check_diffusion(diffusion: DiffusionPipeline, header: MapperHeader, file: Path) -> None:
    """Raises BadInputError, naming both sides, when the mapper answers in another space than the model listens to.

    A model whose configuration does not say what it takes is let through.
    """
    expected = space_of(diffusion, header.space)
    try:
        check_space(header.space, expected)
    except BadInputError as error:
        raise BadInputError(
            f"{file.name}: {error} Give a mapper with --mapper, a diffusion model with --diffusion."
        ) from error


def space_of(diffusion: DiffusionPipeline, unsaid: Space) -> Space:
    """The space a diffusion model takes, read off its configuration; what that leaves open is as in `unsaid`."""
    unet, transformer = getattr(diffusion, "unet", None), getattr(diffusion, "transformer", None)
    if unet is not None:
        width, pooled = unet.config.get("cross_attention_dim"), None
        if unet.config.get("addition_embed_type") == "text_time":  # SDXL
            encoder = getattr(diffusion, "text_encoder_2", None)
            pooled = encoder.config.projection_dim if encoder is not None else unsaid.pooled_width
    elif transformer is not None:
        width = transformer.config.get("joint_attention_dim")
        pooled = transformer.config.get("pooled_projection_dim", unsaid.pooled_width)
    else:
        return unsaid
    if not isinstance(width, int):  # unsaid, or of each block its own
        return unsaid
    facts = width, pooled
    for known in (unsaid, *SPACES.values()):
        if (known.width, known.pooled_width) == facts:
            return known
    return Space(type(diffusion).__name__, unsaid.tokens, *facts)


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
