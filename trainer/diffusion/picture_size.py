"""Which sizes of pictures a diffusion model can take."""

from math import lcm

from diffusers import DiffusionPipeline

from minigpt5_core.conditioning.diffusion_families import keys_of, setting
from minigpt5_core.errors import BadInputError


def check_picture_size(pipeline: DiffusionPipeline, size: int) -> None:
    """BadInputError for a side, in pixels, whose latents the model cannot take whole; 0, its own, always passes."""
    if size == 0:
        return
    unit, most = smallest_size(pipeline), largest_size(pipeline)
    if size < 0 or size % unit:
        near = max(unit, size // unit * unit)
        raise BadInputError(
            f"picture_size is {size}, but {type(pipeline).__name__} takes multiples of {unit} pixels. Set "
            f"picture_size={near} or {near + unit}, or 0 for the model's own."
        )
    if most and size > most:
        raise BadInputError(
            f"picture_size is {size}, but this {type(pipeline).__name__} has places for at most {most} pixels. Set "
            f"picture_size={most} or less, or 0 for the model's own."
        )


def smallest_size(pipeline: DiffusionPipeline) -> int:
    """The side of one patch, in pixels; all sizes are multiples of it."""
    factor, keys = pipeline.vae_scale_factor, keys_of(pipeline)
    if keys is None or not keys.patch:
        return lcm(8, factor)  # diffusers draws multiples of 8 with every UNet
    return factor * (
        keys.patch if isinstance(keys.patch, int) else setting(pipeline, keys.denoiser, keys.patch)
    )


def largest_size(pipeline: DiffusionPipeline) -> int | None:
    """In pixels; None where there is no end, as with UNets and with Flux's rotary positions."""
    keys = keys_of(pipeline)
    places = setting(pipeline, keys.denoiser, keys.places) if keys and keys.places else None
    return places * smallest_size(pipeline) if places else None
