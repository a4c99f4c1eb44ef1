"""Stage 1: captions to pictures. Trains the voken rows and the mapper; the LLM stays frozen (arXiv 2310.02239, 3.3).

python -m trainer align --recipe trainer/recipes/storybook_align.toml --out runs/align
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM

from ..data.source import OpenSource
from ..diffusion import load_frozen_diffusion
from ..llm.adapters import adapt, trainable, with_voken_rows
from ..training.batchers import Batcher, PrefilledBatcher, SequenceBatcher
from ..training.checkpoint import Run, start_accelerator
from ..training.config import DataConfig, StageRecipe
from ..training.loop import TrainableModules, TrainLoop, train
from ..training.pictures import as_pictures_allow
from ..training.previews import preview_with
from ..training.setup import LoadDiffusion, Setup, set_up


@dataclass(frozen=True)
class AlignData(DataConfig):
    """Of the storybook's world: how many different `captions`, and `stories` whose every picture stands behind the
    story's text so far."""

    captions: int = 3000
    stories: int = 0


@dataclass(frozen=True)
class AlignRecipe(StageRecipe):
    """Stage 1's settings."""

    stage: ClassVar[str] = "align"
    default_task: ClassVar[str] = "caption"

    data: AlignData = field(default_factory=AlignData)

    def __post_init__(self) -> None:
        if self.optim.gradient_checkpointing and not self.data.path:
            raise BadInputError(
                "gradient_checkpointing needs data: the storybook's captions are trained on from keys and values that "
                "were computed once, of which nothing is left to save. Leave it out."
            )


def train_align(
    recipe: AlignRecipe,
    out: Path,
    open_source: OpenSource,
    start_from: Path | None = None,
    resume: bool = False,
    load_diffusion: LoadDiffusion = load_frozen_diffusion,
) -> tuple[FrozenLLM, Mapper]:
    """Runs stage 1 and leaves `mapper.safetensors` and `adapter/` in `out`; returns what was trained.

    `start_from` goes on from an earlier run's weights; a LoRA among them stays as it is.
    """

    def adapt_llm(llm: FrozenLLM, folder: Path) -> tuple[FrozenLLM, PeftModel]:
        return freeze_all_but_vokens(*adapt(llm, start_from, with_voken_rows))

    recipe, load_diffusion = as_pictures_allow(recipe, load_diffusion)
    run = Run(recipe, out, start_accelerator(recipe, out), resume)
    setup = set_up(recipe, run, adapt_llm, open_source, start_from, load_diffusion)
    assert setup.adapted is not None
    batcher = batcher_for(setup)
    trained = TrainableModules(setup.mapper, trainable(setup.adapted), batcher.losses)
    optim = recipe.optim
    groups = [
        {"params": trainable(setup.adapted), "lr": optim.voken_lr, "weight_decay": 0.0},
        {"params": setup.mapper.parameters(), "lr": optim.mapper_lr, "weight_decay": optim.weight_decay},
    ]
    loop = TrainLoop(run, trained, groups, setup.source, setup.features)

    def save(step: int) -> None:
        run.save_result(setup.mapper, setup.adapted, setup.llm_folder, step)

    train(loop, lambda step: batcher.batches(step, loop.shard), preview_with(setup), save)
    return setup.llm, setup.mapper


def freeze_all_but_vokens(llm: FrozenLLM, adapted: PeftModel) -> tuple[FrozenLLM, PeftModel]:
    """An earlier run's LoRA is used and stays as it is."""
    adapted.eval()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("trainable_tokens" in name)
    return llm, adapted


def batcher_for(setup: Setup) -> Batcher:
    """Prefilled where the source can say beforehand all that there is to read."""
    passages = setup.source.passages()
    return SequenceBatcher(setup) if passages is None else PrefilledBatcher(setup, passages)
