"""Stage 2: interleaved stories. Trains LoRA or a prefix, the voken rows and the mapper (arXiv 2310.02239, 3.3).

    python -m trainer finetune --recipe trainer/recipes/storybook_finetune.toml --from runs/align --out runs/finetune

A whole story is one sequence with all its voken blocks, so one forward serves all its pictures.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.llm import FrozenLLM, load_vision

from ..data.source import OpenSource
from ..diffusion import load_frozen_diffusion
from ..llm.adapters import adapt, decoder_targets, trainable, voken_tables, with_prefix
from ..training.batchers import SequenceBatcher
from ..training.checkpoint import Run, start_accelerator
from ..training.config import (
    LARGEST,
    DataConfig,
    ModelConfig,
    OptimConfig,
    StageRecipe,
    at_least_one,
    one_of,
    within,
)
from ..training.loop import Batch, TrainableModules, TrainLoop, train
from ..training.pictures import as_pictures_allow
from ..training.previews import preview_with
from ..training.setup import LoadDiffusion, set_up


@dataclass(frozen=True)
class FinetuneModel(ModelConfig):
    """What learns of the LLM, and what it sees by.

    With an `image_adapter`, or where it sees by itself, the LLM is shown pictures; what it sees by stays as it is.

    `adapter` is "lora" (with the published settings), or "prefix": `prefix_tokens` learned keys and values in front,
    made by a network of width `prefix_width` as published (0: learned themselves), at the LoRA's learning rate.
    """

    image_adapter: str = ""
    adapter: str = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple = ("q_proj", "v_proj")
    prefix_tokens: int = 5
    prefix_width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, adapter=("lora", "prefix"))
        within(self, 0, 1, "lora_dropout")
        if self.adapter == "lora":
            at_least_one(self, "lora_rank", "lora_alpha")
        else:
            at_least_one(self, "prefix_tokens")
            within(self, 0, LARGEST, "prefix_width")


@dataclass(frozen=True)
class FinetuneData(DataConfig):
    """Of the storybook's world: how many different `stories`; and beside the stories of each step, `captions` by
    themselves, which keep what stage 1 taught, and for an LLM that sees `questions` what a picture shows."""

    stories: int = 2000
    captions: int = 0
    questions: int = 2


@dataclass(frozen=True)
class FinetuneOptim(OptimConfig):
    """`lora_lr` is the LoRA's or the prefix's."""

    lora_lr: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, 0, LARGEST, "lora_lr")


@dataclass(frozen=True)
class FinetuneRecipe(StageRecipe):
    """Stage 2's settings. `batch` counts stories."""

    stage: ClassVar[str] = "finetune"
    FORMER: ClassVar[dict[str, str]] = StageRecipe.FORMER | {"lora_rate": "optim.lora_lr"}

    model: FinetuneModel = FinetuneModel()
    data: FinetuneData = field(default_factory=FinetuneData)
    optim: FinetuneOptim = FinetuneOptim()


def with_adapter(llm: FrozenLLM, model: FinetuneModel) -> tuple[FrozenLLM, PeftModel]:
    """Adds what the recipe trains of the LLM, whose own weights stay frozen."""
    if model.adapter == "prefix":
        return with_prefix(llm, model.prefix_tokens, model.prefix_width)
    return with_lora(llm, model)


def with_lora(llm: FrozenLLM, model: FinetuneModel) -> tuple[FrozenLLM, PeftModel]:
    """Adds LoRA and trainable voken rows; the layers are changed in place and their own weights stay frozen."""
    tables = voken_tables(llm)
    return llm, get_peft_model(
        llm.causal_lm,
        LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            target_modules=decoder_targets(llm, model.lora_targets),
            trainable_token_indices=dict.fromkeys(tables, llm.voken_ids)
            if len(tables) > 1
            else llm.voken_ids,
        ),
    )


def parameter_groups(optim: FinetuneOptim, adapted: PeftModel, mapper: Mapper) -> list[dict[str, Any]]:
    """What the optimiser moves, and how fast: voken rows, LoRA or prefix, mapper."""
    named = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    rows = [parameter for name, parameter in named if "trainable_tokens" in name]
    others = [parameter for name, parameter in named if "trainable_tokens" not in name]
    return [
        {"params": rows, "lr": optim.voken_lr, "weight_decay": 0.0},
        {"params": others, "lr": optim.lora_lr, "weight_decay": optim.weight_decay},
        {"params": mapper.parameters(), "lr": optim.mapper_lr, "weight_decay": optim.weight_decay},
    ]


def train_finetune(
    recipe: FinetuneRecipe,
    out: Path,
    open_source: OpenSource,
    start_from: Path | None = None,
    resume: bool = False,
    load_diffusion: LoadDiffusion = load_frozen_diffusion,
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 2 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained."""

    def adapt_llm(llm: FrozenLLM, folder: Path) -> tuple[FrozenLLM, PeftModel]:
        if recipe.model.image_adapter:
            llm = load_vision(llm, folder, chosen=Path(recipe.model.image_adapter))
        return adapt(llm, start_from, lambda llm: with_adapter(llm, recipe.model))

    recipe, load_diffusion = as_pictures_allow(recipe, load_diffusion)
    run = Run(recipe, out, start_accelerator(recipe, out), resume)
    setup = set_up(recipe, run, adapt_llm, open_source, start_from, load_diffusion)
    assert setup.adapted is not None
    batcher = SequenceBatcher(setup)
    trained = TrainableModules(setup.mapper, trainable(setup.adapted), batcher.losses)
    groups = parameter_groups(recipe.optim, setup.adapted, setup.mapper)
    loop = TrainLoop(run, trained, groups, setup.source, setup.features)
    setup.adapted.train()

    def batches(step: int) -> list[Batch]:
        own = step * loop.shard.world + loop.shard.rank
        torch.manual_seed(recipe.run.seed * 1_000_003 + own)  # LoRA's dropout
        return batcher.batches(step, loop.shard)

    def save(step: int) -> None:
        run.save_result(setup.mapper, setup.adapted, setup.llm_folder, step)

    train(loop, batches, preview_with(setup), save)
    return setup.llm, setup.mapper
