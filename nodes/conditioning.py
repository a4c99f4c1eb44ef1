"""Load a mapper, and turn vokens into conditioning for any sampler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import folders
from .compat import schema
from .sockets import MAPPER, VOKENS, LoadedMapper, Vokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..minigpt5_core.conditioning import Conditioning, Space

log = logging.getLogger("minigpt5")


class LoadMapper(io.ComfyNode):
    """A voken mapper; its file says what it belongs to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5LoadMapper",
            display_name="Load Voken Mapper (MiniGPT-5)",
            category="MiniGPT-5/loaders",
            description="Loads the small network between LLM and diffusion model. Its file says which two it fits.",
            search_aliases=["mapper", "projector", "connector"],
            inputs=[
                io.Combo.Input(
                    "mapper_name",
                    options=folders.mapper_names(),
                    display_name="mapper",
                    tooltip="A mapper file of python -m trainer, in models/voken_mappers.",
                )
            ],
            outputs=[MAPPER.Output("mapper", display_name="mapper")],
        )

    @classmethod
    def validate_inputs(cls, mapper_name: str | None = None) -> bool | str:
        return folders.problem(folders.find_mapper, mapper_name)

    @classmethod
    def fingerprint_inputs(cls, mapper_name: str | None = None) -> str:
        return folders.fingerprint_chosen(
            mapper_name, folders.mapper_names, lambda name: folders.fingerprint(folders.find_mapper(name))
        )

    @classmethod
    def execute(cls, mapper_name: str) -> io.NodeOutput:
        from ..minigpt5_core.conditioning.mapper_file import load_mapper

        mapper, header = load_mapper(folders.find_mapper(mapper_name))
        return io.NodeOutput(LoadedMapper(mapper, header, mapper_name))


class VokensToConditioning(io.ComfyNode):
    """Vokens -> positive and negative conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5VokensToConditioning",
            display_name="Vokens to Conditioning (MiniGPT-5)",
            category="MiniGPT-5",
            description="Turns a turn's vokens into positive and negative conditioning for any sampler.",
            search_aliases=["text encode", "prompt", "CLIP Text Encode"],
            inputs=[
                VOKENS.Input("vokens", tooltip="From Story Turn."),
                MAPPER.Input("mapper", tooltip="From Load Voken Mapper."),
                io.Int.Input(
                    "picture",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Which of the turn's pictures, counted from 1.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The MODEL that will draw, checked against the mapper here: without it a wrong pair shows "
                    "only in the sampler, as a matrix size error.",
                ),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="An encoded prompt to blend in, for texture that the vokens lack.",
                ),
                io.Float.Input(
                    "text_strength",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0: the vokens alone. 1: the text alone. Without text it does nothing.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive"),
                io.Conditioning.Output("negative", display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        vokens: Vokens,
        mapper: LoadedMapper,
        picture: int,
        model: Any = None,
        text: list | None = None,
        text_strength: float = 0.3,
    ) -> io.NodeOutput:
        import torch

        states = _states(vokens, picture)
        _check_llm(vokens, mapper)
        if model is not None:
            check_model(model, mapper)
        with torch.no_grad():
            positive = mapper.mapper(states.float())
        negative = mapper.mapper.negative()
        blended = _as_comfy(positive) if text is None else _blend(positive, text, text_strength, mapper)
        return io.NodeOutput(_placed(blended), _placed(_as_comfy(negative)))


def _states(vokens: Vokens, picture: int) -> Any:
    count = len(vokens.states)
    if count == 0:
        raise ValueError(
            "This turn asked for no picture, so it has no vokens. In Story Turn, set pictures to 'after_text' for "
            "a picture after every text; with 'when_asked' the LLM decides, and an instruction may ask for one."
        )
    if picture > count:
        raise ValueError(
            f"This turn has {count} picture(s); picture is set to {picture}. Set it to {count} or less. Up to "
            "max_pictures in Story Turn the LLM decides how many there are; the storybook's was trained to ask for one."
        )
    return vokens.states[picture - 1 : picture]


def _check_llm(vokens: Vokens, mapper: LoadedMapper) -> None:
    if mapper.header.llm_hash not in ("", vokens.weights_hash):
        log.warning(
            "The mapper %s was trained with other weights of %s than those of %s; pictures may suffer.",
            mapper.name,
            mapper.header.llm_id,
            vokens.llm,
        )


def check_model(model: Any, mapper: LoadedMapper) -> None:
    """ValueError, naming both, when the mapper's conditioning does not fit this MODEL; unknown models pass."""
    from ..minigpt5_core.conditioning.diffusion_families import SPACES, widths_in_comfyui
    from ..minigpt5_core.conditioning.spaces import Space

    widths = widths_in_comfyui(getattr(getattr(model.model, "model_config", None), "unet_config", None) or {})
    if widths is None:
        return
    space = mapper.header.space
    # a CLIP has a pooled vector whether its model takes it or not: a space of no known family may bring one too many
    pooled = space.pooled_width if space.name in SPACES else widths[1] and space.pooled_width
    if widths == (space.width, pooled):
        _check_latents(model, mapper)
        return
    known = [one for one in SPACES.values() if (one.width, one.pooled_width) == widths]
    found = known[0] if known else Space("another", space.tokens, *widths)
    raise ValueError(
        f"The mapper {mapper.name} answers in the space {space}, but this MODEL takes {found}. "
        f"{_cure(space, found)}"
    )


def _check_latents(model: Any, mapper: LoadedMapper) -> None:
    space = mapper.header.space
    channels = getattr(model.get_model_object("latent_format"), "latent_channels", space.latent_channels)
    if space.latent_channels and channels != space.latent_channels:
        raise ValueError(
            f"The mapper {mapper.name} is for {space}, whose latents have {space.latent_channels} channels; this "
            f"MODEL's have {channels}. Load a checkpoint of the kind {space.name}, or a mapper that was trained for "
            "this one."
        )


def _cure(space: Space, found: Space) -> str:
    if space.name == "storybook":
        return (
            "This is the storybook's mapper: use it with the storybook's own MODEL (Load Diffusers Model, MiniGPT-5), "
            f"or load a mapper that was trained for {found.name} in Load Voken Mapper."
        )
    from ..minigpt5_core.conditioning import SPACES

    if space.name not in SPACES:
        return "Load the checkpoint whose CLIP it was trained with, or train another one: Train Voken Mapper."
    return f"Load a checkpoint of the kind {space.name}, or a mapper that was trained for {found.name}."


def _as_comfy(conditioning: Conditioning) -> list:
    """ComfyUI's CONDITIONING: [[tokens (1, T, C), {"pooled_output": (1, P)}]]."""
    extra = {} if conditioning.pooled is None else {"pooled_output": conditioning.pooled}
    return [[conditioning.tokens, extra]]


def _placed(conditioning: list) -> list:
    """Where ComfyUI has what its text encoders answer (--gpu-only: the GPU); its nodes that mix both move neither."""
    import comfy.model_management as management

    place, key = management.intermediate_device(), "pooled_output"
    return [
        [tokens.to(place), extra if extra.get(key) is None else {**extra, key: extra[key].to(place)}]
        for tokens, extra in conditioning
    ]


def _blend(conditioning: Conditioning, text: list, strength: float, mapper: LoadedMapper) -> list:
    """Vokens and each entry of a text conditioning, mixed token by token; the shorter one is filled with zeros.

    At 0 and 1 it is one of the two, unchanged: a sampler would attend to the zeros too. The text may lie on another
    device (--gpu-only).
    """
    import torch

    blended, device = [], conditioning.tokens.device
    for tokens, extra in text:
        if tokens.shape[-1] != conditioning.tokens.shape[-1]:
            raise ValueError(
                f"The text conditioning is {tokens.shape[-1]} wide, the mapper {mapper.name} answers in "
                f"{mapper.header.space}. Encode the text with the CLIP of the model that the mapper was trained for."
            )
        mixed = dict(extra)
        pooled = extra.get("pooled_output")
        if conditioning.pooled is not None:
            pooled = conditioning.pooled if pooled is None else pooled.to(device).float()
            mixed["pooled_output"] = torch.lerp(conditioning.pooled, pooled, strength)
        blended.append([_mix(conditioning.tokens, tokens.to(device).float(), strength), mixed])
    return blended


def _mix(ours: Tensor, theirs: Tensor, strength: float) -> Tensor:
    """(1, T, C) and (B, T', C) -> (B, longer of T and T', C)."""
    import torch

    if strength in (0.0, 1.0):
        return theirs if strength else ours.expand(len(theirs), -1, -1)
    longest = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (
        torch.nn.functional.pad(side, (0, 0, 0, longest - side.shape[1])) for side in (ours, theirs)
    )
    return torch.lerp(ours.expand(len(theirs), -1, -1), theirs, strength)
