"""What both stages share: the mapper and its targets, the losses, the run folder."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from torch import Tensor

from minigpt5_core.conditioning import SPACES, Conditioning, Space, check_space
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm_files import default_llm
from minigpt5_core.losses import drop_states
from minigpt5_core.mapper import (
    Mapper,
    StandardisedMapper,
    build_mapper,
    compact_config,
    connector_config,
    reference_config,
)
from minigpt5_core.pipeline import DIFFUSION_PRECISIONS, space_of
from minigpt5_core.precision import holding
from minigpt5_core.weights import load_mapper

from .backbone import Backbone, Targets
from .data.cache import CachedFeatures
from .data.stream import Stream
from .data.tasks import Task
from .examples import Shown, fitted
from .recipe import build_recipe

COUNTS = ("steps", "batch", "accumulation", "vokens", "tokens", "preview_every", "save_every", "keep")


@dataclass(frozen=True)
class StageRecipe:
    """Settings both stages know. Loss weights are the published ones; rates are our own.

    `caption_target`: "standardised" (per token and dimension, over the captions) or "raw" (as published).
    `tokens` is how many the mapper answers with; caption alignment needs the text encoder's own number.
    `min_snr_gamma` is for models that predict noise or velocity at a timestep; SD3 and Flux are weighed by their draw.
    `picture_size` is the side of the pictures it is trained with and of previews, in pixels (0: the model's own).
    `image_from` is the share of the steps after which the diffusion loss joins in.

    `data` is a data set's annotation file or folder in one of the formats that `python -m trainer data check` knows
    (empty: the storybook's world), `tasks` how often each task is drawn and with which wordings, `cache` a folder that
    `python -m trainer data cache` has filled.

    `batch` counts the examples of a step over all processes; each process takes its share in `accumulation` parts,
    one after the other. The gradient is the same however it is split. `precision` is "float32" or "bf16" (autocast);
    `llm_precision` how the frozen LLM is held: "float32", "bf16", or "4bit" (NF4); `shard_llm` spreads its layers over
    the processes; `diffusion_precision` how the frozen diffusion model is, "float32" or "bf16", the losses being in
    float32 all the same. "4bit" and the `optimizer` "adamw8bit" need bitsandbytes. `ema_decay` above 0 averages what is
    trained over the steps, and the average is the result.

    Every `save_every` steps a state is saved; the newest `keep` of them and the best one stay. `tracker` is
    "tensorboard", "wandb" or empty.
    """

    llm: str = ""
    diffusion: str = "storybook/diffusers"
    space: str = "storybook"
    mapper: str = "compact"
    vokens: int = 8
    tokens: int = 77
    steps: int = 500
    batch: int = 16
    accumulation: int = 1
    precision: str = "float32"
    llm_precision: str = "float32"
    diffusion_precision: str = "float32"
    shard_llm: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0
    mapper_rate: float = 1e-3
    row_rate: float = 4e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    text_weight: float = 0.01
    image_weight: float = 1.0
    caption_weight: float = 0.1
    caption_target: str = "standardised"
    image_from: float = 0.5
    picture_size: int = 0
    min_snr_gamma: float = 5.0
    dropout: float = 0.1
    data: str = ""
    format: str = "jsonl"
    tasks: dict = field(default_factory=dict)
    cache: str = ""
    preview_every: int = 200
    save_every: int = 200
    keep: int = 2
    tracker: str = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "caption_target": ("standardised", "raw"),
            "precision": ("float32", "bf16"),
            "llm_precision": ("float32", "bf16", "4bit"),
            "diffusion_precision": tuple(DIFFUSION_PRECISIONS),
            "optimizer": ("adamw", "adamw8bit"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise BadInputError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(values)}.")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 0 <= self.ema_decay < 1:
            raise BadInputError(f"ema_decay is {self.ema_decay:g}; it must be 0 (off) or more, and below 1.")
        if self.shard_llm and self.llm_precision == "4bit":
            raise BadInputError(
                "shard_llm does not go with llm_precision=4bit, whose weights cannot be spread. In 4 bits an LLM of 30 "
                "billion parameters fits on 24 GB; else set llm_precision=bf16."
            )
        if self.cache and not self.data:
            raise BadInputError(
                "cache is set, but data is not: the storybook's world is drawn afresh each time."
            )

    def draws(self, step: int) -> bool:
        """Whether the diffusion loss is on in this step."""
        return bool(self.image_weight) and step > self.image_from * self.steps

    @property
    def data_name(self) -> str:
        """What a result's header says it was trained on; a path would say whose machine."""
        return Path(self.data).name if self.data else "storybook"

    def stream(self) -> Stream:
        """The rows of the data set."""
        return Stream(Path(self.data), self.format, self.seed)

    def task_list(self, default: str) -> dict[str, Task]:
        """The tasks the recipe names, or the stage's own."""
        named = self.tasks or {default: {}}
        return {name: build_recipe(Task, values, f"tasks.{name}") for name, values in named.items()}


def new_mapper(recipe: StageRecipe, llm: FrozenLLM, targets: Targets) -> Mapper:
    """An untrained mapper of the recipe's kind; our own kinds answer in the text encoder's scale from the start."""
    if recipe.space not in SPACES:
        raise BadInputError(f"Unknown space {recipe.space!r}. Known: {', '.join(SPACES)}.")
    space = recipe_space(recipe)
    check_space(space, space_of(targets.backbone.pipeline, space))
    configs = {"compact": compact_config, "connector": connector_config, "reference": reference_config}
    if recipe.mapper not in configs:
        raise BadInputError(f"Unknown mapper {recipe.mapper!r}. Known: {', '.join(configs)}.")
    mapper = build_mapper(configs[recipe.mapper](space, llm.width, recipe.vokens))
    if recipe.tokens != len(targets.mean) and recipe.caption_weight:
        raise BadInputError(
            f"tokens is {recipe.tokens}, but the text encoder gives {len(targets.mean)}: caption alignment compares "
            f"them one by one. Set tokens={len(targets.mean)}, or caption_weight=0."
        )
    scale_to(mapper, targets)
    return mapper


def scale_to(mapper: Mapper, targets: Targets) -> None:
    """Lets a mapper of our own kinds answer in the text encoder's scale; another, or one of other tokens, stays."""
    if isinstance(mapper, StandardisedMapper) and mapper.config.tokens == len(targets.mean):
        mapper.target_mean.copy_(targets.mean)
        mapper.target_std.copy_(targets.std)


def recipe_space(recipe: StageRecipe) -> Space:
    """The space the recipe names, with its own number of tokens."""
    return replace(SPACES[recipe.space], tokens=recipe.tokens)


def earlier_mapper(recipe: StageRecipe, llm: FrozenLLM, start: Path) -> Mapper:
    """An earlier run's mapper; BadInputError when it is for another space, LLM width or number of vokens or tokens."""
    mapper, header = load_mapper(start / "mapper.safetensors")
    found = (header.space.name, header.llm_width, mapper.config.vokens, mapper.config.tokens)
    expected = (recipe.space, llm.width, recipe.vokens, recipe.tokens)
    if found != expected:
        raise BadInputError(
            f"--from {start}: its mapper is for space, LLM width, vokens and tokens {found}; the recipe says "
            f"{expected}. Give a run of the same settings."
        )
    return mapper.train()


def picture_latents(backbone: Backbone, shows: Sequence[Shown]) -> Tensor:
    """Scaled latents of what is to be shown, at the size the diffusion model is trained with, (B, C, h, w)."""
    lacking = [one for one in shows if one.latents is None]
    fresh: Iterator[Tensor] = iter(())
    if lacking:
        pictures = [fitted(one.image(random.Random(one.seed)), backbone.side) for one in lacking]
        fresh = iter(backbone.latents(pictures))
    device = backbone.pipeline.device
    return torch.stack([next(fresh) if one.latents is None else one.latents.to(device) for one in shows])


def use_cache(recipe: StageRecipe, backbone: Backbone, llm: FrozenLLM) -> CachedFeatures | None:
    """The recipe's feature cache, which the backbone asks from now on; says what is in it."""
    if not recipe.cache:
        return None
    features = CachedFeatures(Path(recipe.cache), backbone, llm)
    backbone.features = features
    for file, why in features.cache.ignored.items():
        print(f"cache: {file.name} is left out: {why}")
    return features


class PictureLosses:
    """Caption alignment and diffusion loss of a batch of voken states, with classifier-free dropout.

    What is random about a picture follows from its seed, drawn on the CPU: the same on every device, and the same
    beside other pictures.
    """

    def __init__(self, recipe: StageRecipe, mapper: Mapper, targets: Targets) -> None:
        self.recipe, self.mapper, self.targets, self.backbone = recipe, mapper, targets, targets.backbone
        self.aligned = recipe.tokens == len(targets.mean)

    def counts(self, pictures: int, drawn: bool) -> dict[str, int]:
        """How many pictures each of the losses is a mean over."""
        aligned = {"caption": pictures} if self.aligned else {}
        return aligned | ({"image": pictures} if drawn else {})

    def __call__(self, states: Tensor, shows: Sequence[Shown], drawn: bool) -> dict[str, Tensor]:
        """Means over the pictures: `states` (B, V, L); with `drawn` the diffusion loss is among them."""
        if not shows:
            return {}  # a batch whose tasks ask for no picture
        generators = [torch.Generator().manual_seed(one.seed) for one in shows]
        parts = [
            drop_states(state[None], self.recipe.dropout, generator)
            for state, generator in zip(states, generators, strict=True)
        ]
        answer = self.mapper(torch.cat([kept for kept, _ in parts]).float())
        losses = {}
        if self.aligned:
            texts = ["" if gone else one.caption for (_, gone), one in zip(parts, shows, strict=True)]
            standardised = self.recipe.caption_target == "standardised"
            losses["caption"] = self.targets.loss(answer, texts, standardised)
        if drawn:
            losses["image"] = self._image(answer, shows, generators)
        return losses

    def _image(
        self, answer: Conditioning, shows: Sequence[Shown], generators: Sequence[torch.Generator]
    ) -> Tensor:
        latents = picture_latents(self.backbone, shows)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
        times = self.backbone.times(generators).to(latents.device)
        return self.backbone.loss(answer, latents, noise.to(latents.device), times, self.recipe.min_snr_gamma)


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
