"""The settings that the stages share."""

from dataclasses import dataclass, field
from pathlib import Path

from minigpt5_core.errors import BadInputError
from minigpt5_core.pipeline import DIFFUSION_PRECISIONS

from ..common.recipe import build_recipe
from ..data.stream import Stream
from ..data.tasks import Task

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
