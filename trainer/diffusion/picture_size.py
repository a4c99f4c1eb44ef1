"""Which sizes of pictures a diffusion model can take."""

from math import lcm

from diffusers import DiffusionPipeline, FluxPipeline

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
    factor = pipeline.vae_scale_factor
    if (transformer := getattr(pipeline, "transformer", None)) is None:
        return lcm(8, factor)  # diffusers draws multiples of 8 with every UNet
    # Flux's own patch is 1: its pipeline lays 2 x 2 latents into one token before
    return factor * (2 if isinstance(pipeline, FluxPipeline) else transformer.config.patch_size)


def largest_size(pipeline: DiffusionPipeline) -> int | None:
    """In pixels; None where there is no end, as with UNets and with Flux's rotary positions."""
    transformer = getattr(pipeline, "transformer", None)
    places = None if transformer is None else transformer.config.get("pos_embed_max_size")
    return places * smallest_size(pipeline) if places else None
