"""The scorer: a small classifier of hero, prop, place and time. It only measures: no model is trained against it."""

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from minigpt5_core.errors import BadInputError
from minigpt5_core.tensor_files import atomic_save, read_whole

from ...common.images import to_tensor
from ...training.optimise import optimise
from ..world.augment import augment
from ..world.render import render
from ..world.state import HEROES, PLACES, PROPS, TIMES, State
from ..world.stories import random_state

CLASSES: dict[str, tuple] = {
    "hero": tuple(HEROES),
    "prop": (None, *PROPS),
    "place": tuple(PLACES),
    "time": TIMES,
}


@dataclass(frozen=True)
class ScorerRecipe:
    """How to train the scorer on fresh renders, half of them blurred or noisy as an autoencoder's output may be."""

    steps: int = 1500
    batch: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


class Scorer(nn.Module):
    """(B, 3, 128, 128) in [-1, 1] -> logits of every class; `features` are (B, 128)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            kernel = 5 if index == 0 else 3
            layers += [
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        # position matters (the hero is large and low, a companion small), so cells are not averaged away
        self.squeeze = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in CLASSES.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """What distances between pictures are measured in, (B, 128)."""
        return self.squeeze(self.body(pictures))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> list[State]:
        """What each picture shows (companions are not scored)."""
        logits = self(to_tensor(pictures))
        chosen = {name: [CLASSES[name][i] for i in logits[name].argmax(1).tolist()] for name in CLASSES}
        return [State(**{name: chosen[name][i] for name in CLASSES}) for i in range(len(pictures))]


def _batch(count: int, rng: random.Random, augmented: bool) -> tuple[Tensor, dict[str, Tensor]]:
    states = [random_state(rng) for _ in range(count)]
    pictures = [render(state, rng) for state in states]
    if augmented:
        pictures = [augment(picture, rng) for picture in pictures]
    images = to_tensor(pictures)
    if augmented and rng.random() < 0.5:
        images = images + rng.uniform(0, 0.15) * torch.randn_like(images)
    labels = {
        name: torch.tensor([values.index(getattr(state, name)) for state in states])
        for name, values in CLASSES.items()
    }
    return images, labels


def train_scorer(recipe: ScorerRecipe, out: Path) -> dict[str, float]:
    """Trains, writes `out`, and returns the share right of each class on 1000 fresh renders."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"scorer/{recipe.seed}")
    scorer = Scorer()
    optimizer = torch.optim.AdamW(scorer.parameters(), recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps)

    def step_loss(step: int) -> dict[str, Tensor]:
        images, labels = _batch(recipe.batch, rng, augmented=True)
        logits = scorer(images)
        return {name: functional.cross_entropy(logits[name], labels[name]) for name in CLASSES}

    optimise(
        optimizer,
        schedule,
        step_loss,
        steps=recipe.steps,
        samples=recipe.batch,
        save=lambda: atomic_save(scorer.state_dict(), out, {"format": "pt"}),
        save_every=recipe.steps,
        max_norm=math.inf,
    )
    scorer.eval()
    scores = accuracy(scorer, 1000)
    print("scorer:", "  ".join(f"{name} {share:.3f}" for name, share in scores.items()), f"in {out}")
    return scores


@torch.no_grad()
def accuracy(scorer: Scorer, count: int, seed: int = 1) -> dict[str, float]:
    """The share right of each class on fresh renders."""
    rng = random.Random(f"scorer test/{seed}")
    right = dict.fromkeys(CLASSES, 0)
    for _ in range(count // 50):
        images, labels = _batch(50, rng, augmented=False)
        logits = scorer(images)
        for name in CLASSES:
            right[name] += int((logits[name].argmax(1) == labels[name]).sum())
    return {name: value / (count // 50 * 50) for name, value in right.items()}


def load_scorer(path: Path) -> Scorer:
    """A trained scorer, in eval mode."""
    if not path.is_file():
        raise BadInputError(
            f"There is no scorer at {path}. Train one: python -m trainer storybook-scorer --out {path}"
        )
    scorer = Scorer()
    scorer.load_state_dict(read_whole(path)[0], strict=True)
    return scorer.eval()
