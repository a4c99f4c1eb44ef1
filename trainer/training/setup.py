"""What a stage sets up before its first step, part by part: LLM, diffusion model, data, mapper, losses.

The order matters where something is drawn from torch's own random numbers: LoRA's weights before the mapper's.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, PeftType

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.llm.precision import dtype_and_quantization

from ..data.record_source import RecordSource
from ..data.source import DataSource, Features, OpenSource
from ..data.stream import Stream
from ..diffusion import FrozenDiffusion, TextTargets, load_frozen_diffusion
from ..feature_cache.cache import CachedFeatures
from ..llm.fsdp import shard
from .build_mapper import earlier_mapper, new_mapper
from .checkpoint import Run
from .config import ModelConfig, StageRecipe
from .picture_losses import PictureLosses

CAPTIONS_MEASURED = 1000  # whose answers give the spread that caption alignment is measured in

Adapt = Callable[[FrozenLLM, Path], tuple[FrozenLLM, PeftModel | None]]
"""Lays on the LLM, read from a folder, what learns of it or what was learned before."""

LoadDiffusion = Callable[[Path, str, int], FrozenDiffusion]
"""Loads the frozen diffusion model of a folder, in a precision, for pictures of a size."""


@dataclass(frozen=True)
class Setup:
    """Everything a stage works with. `adapted` is the LLM as PEFT has it, None where nothing of it learns."""

    recipe: StageRecipe
    run: Run
    llm: FrozenLLM
    llm_folder: Path
    adapted: PeftModel | None
    diffusion: FrozenDiffusion
    features: CachedFeatures | None
    source: DataSource
    text_targets: TextTargets
    mapper: Mapper
    picture_losses: PictureLosses


def set_up(
    recipe: StageRecipe,
    run: Run,
    adapt: Adapt,
    open_source: OpenSource,
    start_from: Path | None = None,
    load_diffusion: LoadDiffusion = load_frozen_diffusion,
) -> Setup:
    """Loads and checks all parts; `start_from` is an earlier run whose mapper goes on.

    BadInputError says which part cannot be used, before anything in the run's folder is touched.
    """
    torch.manual_seed(recipe.run.seed)
    llm, adapted, folder = set_up_llm(recipe.model, run, adapt)
    diffusion = set_up_diffusion(recipe.model, run, load_diffusion)
    if recipe.optim.gradient_checkpointing and adapted is not None:
        checkpoint_gradients(adapted, diffusion)
    features = use_cache(recipe.data.cache, diffusion, llm)
    source = open_source(llm, features)
    text_targets = measure_captions(diffusion, source)
    if start_from:
        mapper = earlier_mapper(recipe, llm, start_from, text_targets)
    else:
        mapper = new_mapper(recipe, llm, text_targets)
    run.begin(source.name)
    picture_losses = PictureLosses(recipe, mapper, text_targets)
    return Setup(
        recipe, run, llm, folder, adapted, diffusion, features, source, text_targets, mapper, picture_losses
    )


def set_up_llm(model: ModelConfig, run: Run, adapt: Adapt) -> tuple[FrozenLLM, PeftModel | None, Path]:
    """The recipe's LLM, or the default one, with what `adapt` lays on it; the same as PEFT has it; and its folder."""
    folder = Path(model.llm) if model.llm else default_llm()
    llm = load_llm(folder, model.vokens, device=run.llm_device, **dtype_and_quantization(model.llm_precision))
    llm, adapted = adapt(llm, folder)
    if run.shards and adapted is not None:
        shard(llm, adapted, run.accelerator)
    return llm, adapted, folder


def set_up_diffusion(model: ModelConfig, run: Run, load: LoadDiffusion) -> FrozenDiffusion:
    """The recipe's diffusion model, frozen, on the run's device."""
    diffusion = load(Path(model.diffusion), model.diffusion_precision, model.picture_size)
    return diffusion.to(run.accelerator.device)


def measure_captions(diffusion: FrozenDiffusion, source: DataSource) -> TextTargets:
    """What the text encoders answer to the source's first captions; BadInputError where it has none."""
    captions = source.captions(CAPTIONS_MEASURED)
    if not captions:
        raise BadInputError(
            f"{source.name} says of no picture what it shows, and a mapper learns from that. Give captions: a text "
            'before each picture, or in jsonl a caption ({"picture": .., "caption": ..}, or {"caption": ..} alone).'
        )
    return TextTargets(diffusion, captions)


def checkpoint_gradients(adapted: PeftModel, diffusion: FrozenDiffusion) -> None:
    """Gradient checkpointing of LLM and diffusion model: a layer's memory, and half as much time again, as nothing but
    the gradient's way through is computed for frozen weights."""
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
    if diffusion.draws:
        diffusion.denoiser.enable_gradient_checkpointing()


def use_cache(folder: str, diffusion: FrozenDiffusion, llm: FrozenLLM) -> CachedFeatures | None:
    """The feature cache in a folder, which the diffusion model asks from now on; names the files that are no shards."""
    if not folder:
        return None
    features = CachedFeatures(Path(folder), diffusion, llm)
    diffusion.features = features
    for file, why in features.cache.ignored.items():
        print(f"cache: {file.name} is left out: {why}")
    return features


def open_records(recipe: StageRecipe) -> OpenSource:
    """Opens the recipe's data set. A stage that trains on stories draws previews of stories."""

    def open_source(llm: FrozenLLM, features: Features | None) -> DataSource:
        data, default = recipe.data, recipe.default_task
        stream = Stream(Path(data.path), data.format, recipe.run.seed)
        tasks = data.task_list(default)
        return RecordSource(llm, stream, tasks, data.shown_share, features, default == "story")

    return open_source


def step_rng(seed: int, step: int) -> random.Random:
    """Random numbers of one step, the same whether the run was resumed or not."""
    return random.Random(f"{seed}/{step}")
