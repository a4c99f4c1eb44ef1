"""The families of diffusion models. All in which they differ is in one table, an entry each.

To add a family: an entry here, and a training class in the trainer. No torch: the nodes and the command line read this
table before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .spaces import Space


@dataclass(frozen=True)
class DiffusersKeys:
    """Where a pipeline of diffusers says what it takes.

    `pipeline` is its class, of which are the folders that mappers are trained for. `denoiser` is its part that predicts
    noise or velocity; `width` the key of that part's configuration with the conditioning's width C. `pooled` is
    "part.key", the key of a part's configuration with the pooled width P; empty where no pooled vector is taken.
    `mark` is an entry of the denoiser's configuration that no other family has.

    `patch` is how many latents a side a token covers, as a number or a key of the denoiser's configuration; 0 for a
    UNet, which has no tokens. `places` is the key with the most tokens a side, empty where there is no such limit.
    """

    pipeline: str
    denoiser: str
    width: str
    pooled: str = ""
    mark: tuple[str, str] | None = None
    patch: int | str = 0
    places: str = ""


@dataclass(frozen=True)
class ComfyUIKeys:
    """Where the `unet_config` of a ComfyUI MODEL says what it takes.

    `width` is the path of keys to the conditioning's width C, `pooled` the key with the pooled width P. `sizes` is how
    many numbers about the picture's size are counted in `pooled` as well.
    """

    width: tuple[str, ...]
    pooled: str
    sizes: int = 0


@dataclass(frozen=True)
class DiffusionFamily:
    """One family: the conditioning it takes, and how its models say so.

    `training` is its training class, "module.Class", in the trainer's package for diffusion models.
    """

    space: Space
    training: str
    diffusers: DiffusersKeys
    comfyui: ComfyUIKeys


_SD = DiffusersKeys("StableDiffusionPipeline", "unet", "cross_attention_dim")
_SDXL = DiffusersKeys(
    "StableDiffusionXLPipeline",
    "unet",
    "cross_attention_dim",
    pooled="text_encoder_2.projection_dim",
    mark=("addition_embed_type", "text_time"),
)
_SD3 = DiffusersKeys(
    "StableDiffusion3Pipeline",
    "transformer",
    "joint_attention_dim",
    pooled="transformer.pooled_projection_dim",
    patch="patch_size",
    places="pos_embed_max_size",
)
_FLUX = DiffusersKeys(
    "FluxPipeline",
    "transformer",
    "joint_attention_dim",
    pooled="transformer.pooled_projection_dim",
    patch=2,  # the transformer's own patch is 1: the pipeline packs 2 x 2 latents into a token before
)
_COMFYUI_SD = ComfyUIKeys(("context_dim",), "adm_in_channels")

DIFFUSION_FAMILIES: dict[str, DiffusionFamily] = {
    family.space.name: family
    for family in (
        DiffusionFamily(Space("sd15", 77, 768), "unet.Sd", _SD, _COMFYUI_SD),
        DiffusionFamily(Space("sd21", 77, 1024), "unet.Sd", _SD, _COMFYUI_SD),
        DiffusionFamily(
            Space("sdxl", 77, 2048, 1280),
            "unet.Sdxl",
            _SDXL,
            ComfyUIKeys(("context_dim",), "adm_in_channels", sizes=1536),
        ),
        DiffusionFamily(
            Space("sd3", 154, 4096, 2048, latent_channels=16),  # 77 of two CLIPs, then 77 of T5
            "flow.Sd3",
            _SD3,
            ComfyUIKeys(("context_embedder_config", "params", "in_features"), "adm_in_channels"),
        ),
        DiffusionFamily(
            Space("flux", 256, 4096, 768, latent_channels=16),  # T5's, as ComfyUI gives it
            "flow.Flux",
            _FLUX,
            ComfyUIKeys(("context_in_dim",), "vec_in_dim"),
        ),
        DiffusionFamily(Space("storybook", 77, 128), "unet.Sd", _SD, _COMFYUI_SD),
    )
}
SPACES: dict[str, Space] = {name: family.space for name, family in DIFFUSION_FAMILIES.items()}


def family_of(pipeline: Any) -> DiffusionFamily | None:
    """The family of a diffusers pipeline, by its class; None for one that no mapper is trained for.

    Families that differ in nothing but their space (SD 1.5, SD 2.1, the storybook's) share a class: the first is given.
    """
    classes = {kind.__name__ for kind in type(pipeline).__mro__}
    families = DIFFUSION_FAMILIES.values()
    return next((family for family in families if family.diffusers.pipeline in classes), None)


def keys_of(pipeline: Any) -> DiffusersKeys | None:
    """How to read a diffusers pipeline: as its own family, or as one that is built alike; None where none is."""
    if family := family_of(pipeline):
        return family.diffusers
    known = dict.fromkeys(family.diffusers for family in DIFFUSION_FAMILIES.values())
    alike = [keys for keys in known if getattr(pipeline, keys.denoiser, None) is not None]
    marked = [
        keys for keys in alike if keys.mark and setting(pipeline, keys.denoiser, keys.mark[0]) == keys.mark[1]
    ]
    return next(iter([*marked, *(keys for keys in alike if not keys.mark)]), None)


def widths_in_diffusers(pipeline: Any, default: Space) -> tuple[int, int | None] | None:
    """(C, P) that a diffusers pipeline takes; what its configuration omits comes from `default`.

    None where it does not say a width: for pipelines of other kinds, and for UNets with a width for each block.
    """
    keys = keys_of(pipeline)
    width = setting(pipeline, keys.denoiser, keys.width) if keys else None
    if keys is None or not isinstance(width, int):
        return None
    if not keys.pooled:
        return width, None
    part, key = keys.pooled.split(".")
    return width, setting(pipeline, part, key, default.pooled_width)


def widths_in_comfyui(config: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """(C, P) that a ComfyUI MODEL with this `unet_config` takes; None where it does not say a width."""
    found = [(family, _at(config, family.comfyui.width)) for family in DIFFUSION_FAMILIES.values()]
    said = [(family, width) for family, width in found if width]
    if not said:
        return None
    family, width = next((pair for pair in said if pair[0].space.width == pair[1]), said[0])
    pooled, sizes = config.get(family.comfyui.pooled) or None, family.comfyui.sizes
    return width, pooled - sizes if pooled and pooled > sizes else pooled


def setting(pipeline: Any, part: str, key: str, default: Any = None) -> Any:
    """An entry of the configuration of one of the pipeline's parts; `default` where part or entry is missing."""
    config = getattr(getattr(pipeline, part, None), "config", {})
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What stands at a path of keys, None where it ends early."""
    inside: Any = config
    for key in path:
        inside = (inside or {}).get(key)
    return inside
