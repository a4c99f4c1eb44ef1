"""Every entry of the table of diffusion families is whole, and all that reads a model goes by it."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest

from minigpt5_core.conditioning import DIFFUSION_FAMILIES, SPACES
from minigpt5_core.conditioning.diffusion_families import (
    family_of,
    keys_of,
    widths_in_comfyui,
    widths_in_diffusers,
)
from minigpt5_core.conditioning.spaces import Space

FAMILIES = pytest.mark.parametrize("name", DIFFUSION_FAMILIES)
DENOISERS = {
    "StableDiffusionPipeline": diffusers.UNet2DConditionModel,
    "StableDiffusionXLPipeline": diffusers.UNet2DConditionModel,
    "StableDiffusion3Pipeline": diffusers.SD3Transformer2DModel,
    "FluxPipeline": diffusers.FluxTransformer2DModel,
}
UNSAID = Space("unsaid", 77, 5, 6)


def pipeline_of(name, **settings):
    """A pipeline of a family's own class, with no weights: its parts' configurations alone."""
    keys = DIFFUSION_FAMILIES[name].diffusers
    pipeline = object.__new__(getattr(diffusers, keys.pipeline))
    part, _, key = keys.pooled.partition(".")
    parts = {keys.denoiser: {keys.width: 48, **settings}}
    if part:
        parts.setdefault(part, {})[key] = 24
    for place, config in parts.items():
        object.__setattr__(pipeline, place, SimpleNamespace(config=config))
    return pipeline


@FAMILIES
def test_an_entry_is_listed_under_its_spaces_name_and_its_space_in_the_table_of_spaces(name):
    assert DIFFUSION_FAMILIES[name].space.name == name
    assert SPACES[name] is DIFFUSION_FAMILIES[name].space


@FAMILIES
def test_an_entrys_keys_are_those_of_diffusers_own_classes(name):
    family = DIFFUSION_FAMILIES[name]
    keys = family.diffusers
    parts = inspect.signature(getattr(diffusers, keys.pipeline)).parameters
    settings = inspect.signature(DENOISERS[keys.pipeline]).parameters
    wanted = [keys.width, keys.mark[0] if keys.mark else "", keys.patch, keys.places]
    assert keys.denoiser in parts and keys.pooled.split(".")[0] in {"", *parts}
    assert all(key in settings for key in wanted if key and isinstance(key, str))
    assert bool(keys.pooled) == bool(family.space.pooled_width)


@pytest.mark.trains
@FAMILIES
def test_an_entrys_training_class_is_there(name):
    from trainer.diffusion import FrozenDiffusion, training_class

    family = DIFFUSION_FAMILIES[name]
    found = training_class(family)
    assert issubclass(found, FrozenDiffusion) and found.__name__ == family.training.split(".")[1]
    assert found.pools == bool(family.space.pooled_width)


@FAMILIES
def test_a_pipeline_is_read_as_its_familys_entry_says(name):
    family = DIFFUSION_FAMILIES[name]
    pipeline = pipeline_of(name)
    assert keys_of(pipeline) is family.diffusers is family_of(pipeline).diffusers
    pooled = 24 if family.diffusers.pooled else None
    assert widths_in_diffusers(pipeline, UNSAID) == (48, pooled)


@FAMILIES
def test_a_pipeline_of_another_class_is_read_as_one_that_is_built_alike(name):
    keys = DIFFUSION_FAMILIES[name].diffusers
    settings = dict([keys.mark] if keys.mark else [])
    alike = SimpleNamespace(**{keys.denoiser: SimpleNamespace(config={keys.width: 48, **settings})})
    pooled = UNSAID.pooled_width if keys.pooled else None  # it has no configuration that says one
    assert family_of(alike) is None
    assert widths_in_diffusers(alike, UNSAID) == (48, pooled)


@FAMILIES
def test_a_comfyui_model_that_says_the_familys_widths_takes_its_space(name):
    family = DIFFUSION_FAMILIES[name]
    keys, space = family.comfyui, family.space
    *folders, last = keys.width
    config = {last: space.width}
    for folder in reversed(folders):
        config = {folder: config}
    config[keys.pooled] = space.pooled_width and space.pooled_width + keys.sizes
    assert widths_in_comfyui(config) == (space.width, space.pooled_width)


@pytest.mark.parametrize("config", [{}, {"context_dim": None}, {"context_embedder_config": None}])
def test_a_comfyui_model_that_says_no_width_is_of_no_known_family(config):
    assert widths_in_comfyui(config) is None


def test_a_width_for_each_block_is_no_width():
    assert (
        widths_in_diffusers(
            SimpleNamespace(unet=SimpleNamespace(config={"cross_attention_dim": (8, 16)})), UNSAID
        )
        is None
    )
