"""What both stages share: the mapper and its targets, the losses, the run folder."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from minigpt5_core.conditioning import SPACES, Space
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.losses import (
    LossWeights,
    caption_loss,
    compute_snr,
    diffusion_loss,
    drop_states,
    target_statistics,
)
from minigpt5_core.mapper import CompactMapper, Mapper, build_mapper, compact_config, reference_config
from minigpt5_core.weights import load_mapper

from .data.stream import Stream
from .data.tasks import Task
from .examples import Shown, fitted
from .recipe import build_recipe
from .storybook.autoencoder import encode_pictures
from .storybook.diffusion import encode_texts


@dataclass(frozen=True)
class StageRecipe:
    """Settings both stages know. Loss weights are the published ones; rates are our own.

    `caption_target`: "standardised" (per token and dimension, over the captions) or "raw" (as published).
    `tokens` is how many the mapper answers with; caption alignment needs the text encoder's own number.
    `image_from` is the share of the steps after which the diffusion loss joins in.

    `data` is a data set's annotation file or folder in one of the formats that `python -m trainer data check` knows
    (empty: the storybook's world), `tasks` how often each task is drawn and with which wordings.

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
    mapper_rate: float = 1e-3
    row_rate: float = 4e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    text_weight: float = 0.01
    image_weight: float = 1.0
    caption_weight: float = 0.1
    caption_target: str = "standardised"
    image_from: float = 0.5
    min_snr_gamma: float = 5.0
    dropout: float = 0.1
    data: str = ""
    format: str = "jsonl"
    tasks: dict = field(default_factory=dict)
    preview_every: int = 200
    save_every: int = 200
    keep: int = 2
    tracker: str = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.caption_target not in ("standardised", "raw"):
            raise BadInputError(f"caption_target is {self.caption_target!r}; it can be standardised or raw.")
        for name in ("steps", "batch", "vokens", "tokens", "preview_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

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


class Targets:
    """What the mapper should answer: the diffusion model's own text encoder on the full caption."""

    def __init__(self, pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> None:
        self.pipeline = pipeline
        states = torch.cat([self.encode(captions[i : i + 64]) for i in range(0, len(captions), 64)])
        self.mean, self.deviation = target_statistics(states, smallest=1e-2)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(B, T, C)."""
        return encode_texts(self.pipeline, texts)


def load_diffusion(folder: Path) -> StableDiffusionPipeline:
    """The frozen text-to-image model of a diffusers folder."""
    if not (folder / "model_index.json").is_file():
        raise BadInputError(
            f"{folder} is no diffusers folder (no model_index.json). Set diffusion to one that is."
        )
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def new_mapper(recipe: StageRecipe, llm: FrozenLLM, targets: Targets) -> Mapper:
    """An untrained mapper of the recipe's kind; a compact one answers in the text encoder's scale from the start."""
    if recipe.space not in SPACES:
        raise BadInputError(f"Unknown space {recipe.space!r}. Known: {', '.join(SPACES)}.")
    configs = {"compact": compact_config, "reference": reference_config}
    if recipe.mapper not in configs:
        raise BadInputError(f"Unknown mapper {recipe.mapper!r}. Known: {', '.join(configs)}.")
    mapper = build_mapper(configs[recipe.mapper](recipe_space(recipe), llm.width, recipe.vokens))
    if recipe.tokens != len(targets.mean) and recipe.caption_weight:
        raise BadInputError(
            f"tokens is {recipe.tokens}, but the text encoder gives {len(targets.mean)}: caption alignment compares "
            "them one by one. Set caption_weight=0, or leave tokens as it is."
        )
    scale_to(mapper, targets)
    return mapper


def scale_to(mapper: Mapper, targets: Targets) -> None:
    """Lets a compact mapper answer in the text encoder's scale; one of another kind, or number of tokens, stays."""
    if isinstance(mapper, CompactMapper) and mapper.config.tokens == len(targets.mean):
        mapper.target_mean.copy_(targets.mean)
        mapper.target_std.copy_(targets.deviation)


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


def picture_latents(pipeline: StableDiffusionPipeline, shows: Sequence[Shown], draw: random.Random) -> Tensor:
    """Scaled latents of what is to be shown, at the size the diffusion model was trained on, (B, C, h, w)."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return encode_pictures(pipeline.vae, [fitted(one.image(draw), side) for one in shows])


class Trained(nn.Module):
    """Everything that learns, and nothing else: what the optimiser sees and a saved state holds."""

    def __init__(self, mapper: Mapper, adapter_parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.mapper = mapper
        self.adapter = nn.ParameterList(adapter_parameters)


class PictureLosses:
    """Caption alignment and diffusion loss of a batch of voken states, with classifier-free dropout."""

    def __init__(self, recipe: StageRecipe, mapper: Mapper, targets: Targets) -> None:
        self.recipe, self.mapper, self.targets = recipe, mapper, targets
        self.unet = targets.pipeline.unet
        self.noise = DDPMScheduler.from_config(targets.pipeline.scheduler.config)
        self.weights = LossWeights(recipe.text_weight, recipe.image_weight, recipe.caption_weight)

    def __call__(
        self, states: Tensor, captions: Sequence[str], latents: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """`states` (B, V, L); `latents` (B, 4, h, w), or None while the diffusion loss is off."""
        if not len(states):
            return {}  # a batch whose tasks ask for no picture
        states, dropped = drop_states(states, self.recipe.dropout, generator)
        answer = self.mapper(states).tokens
        texts = ["" if gone else text for text, gone in zip(captions, dropped.tolist(), strict=True)]
        scale = self.targets.deviation if self.recipe.caption_target == "standardised" else None
        losses = {}
        if answer.shape[1] == len(self.targets.mean):
            losses["caption"] = caption_loss(answer, self.targets.encode(texts), scale)
        if latents is not None:
            losses["image"] = self._image(answer, latents, generator)
        return losses

    def _image(self, answer: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        # drawn on the CPU, so that every device sees the same numbers
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        steps = torch.randint(0, self.noise.config.num_train_timesteps, (len(latents),), generator=generator)
        steps = steps.to(latents.device)
        predicted = self.unet(self.noise.add_noise(latents, noise, steps), steps, answer).sample
        return diffusion_loss(
            predicted, noise, compute_snr(self.noise.alphas_cumprod, steps), self.recipe.min_snr_gamma
        )


def step_generator(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """Random numbers of one step, the same whether the run was resumed or not."""
    return random.Random(f"{seed}/{step}"), torch.Generator().manual_seed(seed * 1_000_003 + step)
