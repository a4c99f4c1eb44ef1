"""The benchmark's strongest baseline: an LLM tuned to write a full caption after each scene, for text-to-image.

    python -m trainer caption-adapter --recipe trainer/recipes/storybook_caption_adapter.toml --out runs/captions

It has no voken, no mapper and no pictures. Its data and its loss on text are finetune's, and its LoRA has as many
parameters as finetune's LoRA, voken rows and mapper together; how many steps it takes is up to the recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from minigpt5_core.generate import Prompt, Sampling
from minigpt5_core.llm import FrozenLLM, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.story.prompts import Turn, chat_text

from ...llm.adapters import save_adapter, trainable
from ...llm.sequences import story_sequence, text_losses
from ...training.optimise import optimise
from ...training.setup import step_rng
from ..world.stories import TrueScene, stories

OPEN, CLOSE = "\n(", ")"
CAPTIONING = Sampling(temperature=0.0, max_new_tokens=40, pictures="none", stop_strings=(CLOSE,))


@dataclass(frozen=True)
class CaptionAdapterRecipe:
    """As in finetune, except for the rank: 46 gives 2.65 M parameters, and finetune trains 2.67 M in all."""

    llm: str = ""
    stories: int = 8000
    steps: int = 600
    batch: int = 2
    lora_rank: int = 46
    lora_alpha: int = 92
    lora_dropout: float = 0.05
    lora_targets: tuple = ("q_proj", "v_proj")
    lora_rate: float = 1e-3
    warmup: float = 0.05
    save_every: int = 100
    seed: int = 0


def captioned_turns(scenes: Sequence[TrueScene]) -> list[Turn]:
    """A story whose every reply ends with its picture's caption in brackets."""
    return [Turn(s.request, f"{s.text}{OPEN}{s.caption}{CLOSE}", picture=False) for s in scenes]


def caption_prompt(llm: FrozenLLM, earlier: Sequence[Turn], scene: TrueScene) -> Prompt:
    """The story up to where the caption of `scene` begins, behind its sentence."""
    return Prompt(llm.encode(chat_text(llm, [*earlier, Turn(scene.request)]) + scene.text + OPEN))


def train_caption_adapter(recipe: CaptionAdapterRecipe, out: Path) -> PeftModel:
    """Writes `adapter/` in `out`; Ctrl-C saves it as it is then."""
    torch.manual_seed(recipe.seed)
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_llm(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    adapted = get_peft_model(llm.causal_lm, _lora(recipe)).train()
    data = list(islice(stories(recipe.seed), recipe.stories))
    optimizer = torch.optim.AdamW(trainable(adapted), recipe.lora_rate, weight_decay=0.0)

    def step_loss(step: int) -> dict[str, Tensor]:
        batch = step_rng(recipe.seed, step).sample(data, recipe.batch)
        sequences = [story_sequence(llm, captioned_turns(scenes)) for scenes in batch]
        return {"text": text_losses(llm, sequences)}

    optimise(
        optimizer,
        get_cosine_schedule_with_warmup(optimizer, int(recipe.warmup * recipe.steps), recipe.steps),
        step_loss,
        steps=recipe.steps,
        samples=recipe.batch,
        save=lambda: save_adapter(adapted, folder, out / "adapter"),
        save_every=recipe.save_every,
    )
    return adapted


def _lora(recipe: CaptionAdapterRecipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
    )
