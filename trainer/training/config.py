"""The settings that the stages share, a table each: [model], [data], [optim], [loss], [run].

Loss weights are the published ones (arXiv 2310.02239, section 3.3); learning rates are our own.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minigpt5_core.diffusion import DIFFUSION_PRECISIONS
from minigpt5_core.errors import BadInputError

from ..common.recipe import build_recipe
from ..data.tasks import Task

LARGEST = sys.float_info.max  # any number but an infinite one


def one_of(table: Any, **known: tuple[str, ...]) -> None:
    """BadInputError unless each named setting has one of its known values."""
    for name, values in known.items():
        if getattr(table, name) not in values:
            raise BadInputError(f"{name} is {getattr(table, name)!r}; it can be {' or '.join(values)}.")


def at_least_one(table: Any, *names: str) -> None:
    """BadInputError unless each named count is 1 or more."""
    for name in names:
        if getattr(table, name) < 1:
            raise BadInputError(f"{name} is {getattr(table, name)}; it must be 1 or more.")


def within(table: Any, low: float, high: float, *names: str) -> None:
    """BadInputError unless each named number lies between the two, or is one of them."""
    for name in names:
        value = getattr(table, name)
        if not low <= value <= high:  # NaN does not either
            most = "finite" if high == LARGEST else f"at most {high:g}"
            raise BadInputError(f"{name} is {value:g}; it must be {low:g} or more, and {most}.")


class Unasked(float):
    """A default that gives way where it cannot be had; a value that somebody gave is an order."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen models, and the mapper between them.

    `llm` is a Hugging Face folder or GGUF file (empty: the default LLM), `llm_precision` how its weights are held:
    "float32", "bf16", or "4bit" (NF4, needs bitsandbytes); `shard_llm` spreads its layers over the processes (FSDP).
    `diffusion` is a diffusers folder, of which text encoders and tokenizers are enough where there are no pictures; or
    for these a checkpoint file (.safetensors) of SD 1.5, SD 2.x or SDXL, with the folder of its CLIP `tokenizer`
    (empty: looked for). `diffusion_precision` is "float32" or "bf16"; losses are in float32 all the same.
    `picture_size` is the side of the pictures it is trained with and of previews, in pixels (0: the model's own).

    `mapper` is "compact", "connector" or "reference"; it turns `vokens` states into `tokens` tokens of the conditioning
    `space`. Caption alignment needs the text encoder's own number of tokens.
    """

    llm: str = ""
    llm_precision: str = "float32"
    shard_llm: bool = False
    diffusion: str = "storybook/diffusers"
    tokenizer: str = ""
    diffusion_precision: str = "float32"
    picture_size: int = 0
    space: str = "storybook"
    mapper: str = "compact"
    vokens: int = 8
    tokens: int = 77

    def __post_init__(self) -> None:
        one_of(
            self,
            llm_precision=("float32", "bf16", "4bit"),
            diffusion_precision=tuple(DIFFUSION_PRECISIONS),
        )
        at_least_one(self, "vokens", "tokens")
        if self.shard_llm and self.llm_precision == "4bit":
            raise BadInputError(
                "shard_llm does not go with llm_precision=4bit, whose weights cannot be spread. In 4 bits an LLM of 30 "
                "billion parameters fits on 24 GB; else set llm_precision=bf16."
            )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    `path` (flat: `data`) is a data set's annotation file or folder in one of the formats that `python -m trainer data
    check` knows (empty: the storybook's world), `tasks` how often each task is drawn and with which wordings, `cache` a
    folder that `python -m trainer data cache` has filled. An LLM that sees is shown the pictures of its own blocks in a
    `shown_share` of the examples.
    """

    path: str = ""
    format: str = "jsonl"
    tasks: dict = field(default_factory=dict)
    cache: str = ""
    shown_share: float = 0.5

    def __post_init__(self) -> None:
        within(self, 0, 1, "shown_share")
        if self.cache and not self.path:
            raise BadInputError(
                "cache is set, but data is not: the storybook's world is drawn afresh each time."
            )

    def task_list(self, default: str) -> dict[str, Task]:
        """The tasks that are named, or `default` alone."""
        named = self.tasks or {default: {}}
        return {name: build_recipe(Task, values, f"tasks.{name}") for name, values in named.items()}


@dataclass(frozen=True)
class OptimConfig:
    """How it learns.

    `batch` counts the examples of a step over all processes; each process takes its share in `accumulation` parts, one
    after the other. The gradient is the same however it is split. `precision` is "float32" or "bf16" (autocast). The
    `optimizer` is "adamw" or "adamw8bit" (needs bitsandbytes). Learning rates rise over the `warmup` share of the steps
    and fall as a cosine. `ema_decay` above 0 averages what is trained over the steps, and the average is the result.
    `gradient_checkpointing` trades half as much time again for the memory of all layers but one.
    """

    steps: int = 500
    batch: int = 16
    accumulation: int = 1
    precision: str = "float32"
    optimizer: str = "adamw"
    mapper_lr: float = 1e-3
    voken_lr: float = 4e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        one_of(self, precision=("float32", "bf16"), optimizer=("adamw", "adamw8bit"))
        at_least_one(self, "steps", "batch", "accumulation")
        within(self, 0, LARGEST, "mapper_lr", "voken_lr", "weight_decay")
        within(self, 0, 1, "warmup")
        if not 0 <= self.ema_decay < 1:
            raise BadInputError(f"ema_decay is {self.ema_decay:g}; it must be 0 (off) or more, and below 1.")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: text, caption and image (diffusion) loss, weighed.

    `caption_target`: "standardised" (per token and dimension, over the captions) or "raw" (as published). `image_from`
    is the share of the steps after which the diffusion loss joins in; where there is no picture to be had, it is off.
    `min_snr_gamma` is for models that predict noise or velocity at a timestep; SD3 and Flux are weighed by how often a
    timestep is drawn. `dropout` is the share of the samples whose voken states are replaced by zeros, for
    classifier-free guidance.
    """

    text_weight: float = 0.01
    image_weight: float = Unasked(1.0)
    caption_weight: float = 0.1
    caption_target: str = "standardised"
    image_from: float = 0.5
    min_snr_gamma: float = 5.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        one_of(self, caption_target=("standardised", "raw"))
        within(
            self, 0, LARGEST, "text_weight", "image_weight", "caption_weight", "image_from", "min_snr_gamma"
        )
        within(self, 0, 1, "dropout")


@dataclass(frozen=True)
class RunConfig:
    """What is seen and kept of a run.

    Every `save_every` steps a state is saved; the newest `keep` of them and the best one stay. `tracker` is
    "tensorboard", "wandb" or empty.
    """

    preview_every: int = 200
    save_every: int = 200
    keep: int = 2
    tracker: str = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "preview_every", "save_every", "keep")


@dataclass(frozen=True)
class StageRecipe:
    """A stage's settings. `default_task` is drawn of a data set where the recipe names none.

    `FORMER` are keys by names that they had, or have, outside of their table.
    """

    FLAT: ClassVar[bool] = True
    stage: ClassVar[str] = ""
    default_task: ClassVar[str] = "story"
    FORMER: ClassVar[dict[str, str]] = {
        "data": "data.path",
        "mapper_rate": "optim.mapper_lr",
        "row_rate": "optim.voken_lr",
    }

    model: ModelConfig = ModelConfig()
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    run: RunConfig = RunConfig()

    def uses_diffusion_loss(self, step: int) -> bool:
        """Whether the diffusion loss is on in this step."""
        return bool(self.loss.image_weight) and step > self.loss.image_from * self.optim.steps
