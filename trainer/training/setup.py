"""What the stages set up in the same way: the frozen LLM, the feature cache, what saves memory."""

import random
from pathlib import Path

import torch
from peft import PeftModel, PeftType

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm_files import default_llm
from minigpt5_core.precision import holding

from ..diffusion import Backbone
from ..feature_cache.cache import CachedFeatures
from .config import StageRecipe


def use_cache(recipe: StageRecipe, backbone: Backbone, llm: FrozenLLM) -> CachedFeatures | None:
    """The recipe's feature cache, which the backbone asks from now on; says what is in it."""
    if not recipe.cache:
        return None
    features = CachedFeatures(Path(recipe.cache), backbone, llm)
    backbone.features = features
    for file, why in features.cache.ignored.items():
        print(f"cache: {file.name} is left out: {why}")
    return features


def load_frozen_llm(recipe: StageRecipe, device: torch.device) -> tuple[FrozenLLM, Path]:
    """The recipe's LLM, or the default one, as it asks for it to be held; and its folder."""
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    return load_llm(folder, recipe.vokens, device=device, **holding(recipe.llm_precision)), folder


def save_memory(recipe: StageRecipe, adapted: PeftModel, backbone: Backbone) -> None:
    """Gradient checkpointing of LLM and diffusion model where the recipe asks for it: a layer's memory, and half as
    much time again, as nothing but the gradient's way through is computed for frozen weights."""
    if not recipe.gradient_checkpointing:
        return
    if adapted.peft_config["default"].peft_type == PeftType.PREFIX_TUNING:
        raise BadInputError(
            "gradient_checkpointing does not go with adapter=prefix: transformers leaves keys and values that stand in "
            "front out of a layer that is computed twice. Set gradient_checkpointing=false, or adapter=lora."
        )
    model = adapted.get_base_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        # in a model that is only used nothing is computed twice; dropout stays as it was
        layer.training |= getattr(layer, "gradient_checkpointing", False)
    backbone.network.enable_gradient_checkpointing()


def step_chance(seed: int, step: int) -> random.Random:
    """Random numbers of one step, the same whether the run was resumed or not."""
    return random.Random(f"{seed}/{step}")
