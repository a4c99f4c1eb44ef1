"""Whether what vokens ask for is what a world's held-out stories show, without a picture: by the text encoder alone.

    python -m trainer world FILE.toml --measure runs/finetune --stories 40

The mapper's answer is compared with what the diffusion model's text encoder says of the true caption, and of every
caption that is one fact apart from it (another hero, prop, place, time or companion). The true one should be nearest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.conditioning.fit import answer_loss
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import StoryCache
from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.losses import Statistics
from minigpt5_core.metrics import Interval, bootstrap
from minigpt5_core.story.prompts import Turn

from ..diffusion import load_text_encoders
from ..worlds.tell import WorldScene, stories
from ..worlds.world import State, World
from .drawing import voken_states

Answers = Callable[[Sequence[WorldScene]], Iterator[Conditioning]]
"""What the mapper asks for, scene by scene of a story; tokens (1, T, C), pooled (1, P) where there is one."""

Encode = Callable[[Sequence[str]], Conditioning]
"""What the text encoder answers to captions; tokens (B, T, C), pooled (B, P) where there is one."""

MEASURED, AT_ONCE = 1000, 64


@dataclass(frozen=True)
class NearestRecipe:
    """`run` holds `mapper.safetensors` and `adapter/`; `llm` (empty: the default one) and `diffusion` are what it was
    trained with; `stories` held-out stories of `seed` are told."""

    run: Path
    llm: str = ""
    diffusion: str = "storybook/diffusers"
    stories: int = 40
    seed: int = 7


class Distances:
    """The text encoder's answers to a world's captions, kept, and how far another answer is from them.

    Squared distances, tokens and pooled alike, in units of the spread over `captions`, as training minimises them.
    """

    def __init__(self, encode: Encode, captions: Sequence[str]) -> None:
        self.encode, self.known = encode, dict[str, Conditioning]()
        tokens, pooled = Statistics(smallest=1e-2), Statistics(smallest=1e-2)
        for first in range(0, len(captions), AT_ONCE):
            answer = encode(captions[first : first + AT_ONCE])
            tokens.add(answer.tokens)
            if answer.pooled is not None:
                pooled.add(answer.pooled[:, None])
        self.std = tokens.std
        self.pooled_std = pooled.std if pooled.count else None

    def __call__(self, answer: Conditioning, captions: Sequence[str]) -> list[float]:
        """The distance of `answer` (a batch of one) from what the text encoder says of each caption."""
        self._remember(captions)
        return [self._distance(answer, self.known[caption]) for caption in captions]

    def _remember(self, captions: Sequence[str]) -> None:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        for first in range(0, len(new), AT_ONCE):
            some = new[first : first + AT_ONCE]
            answer = self.encode(some)
            for row, caption in enumerate(some):
                pooled = None if answer.pooled is None else answer.pooled[row : row + 1]
                self.known[caption] = Conditioning(answer.tokens[row : row + 1], pooled)

    def _distance(self, one: Conditioning, other: Conditioning) -> float:
        return float(answer_loss(one, other, self.std.to(one.tokens.device), self.pooled_std))


def nearest(
    world: World, told: Sequence[Sequence[WorldScene]], answers: Answers, distances: Distances
) -> dict[str, Interval | None]:
    """The share of scenes whose true caption is nearer than all that are one fact apart: by fact, and of all facts.

    With 95 % intervals over stories. "prop carried" is of scenes whose prop an earlier scene has named.
    """
    rows: dict[str, list[tuple[float, int]]] = {}
    for number, scenes in enumerate(told):
        for scene, answer in zip(scenes, answers(scenes), strict=True):
            right = is_nearest(world, scene.state, answer, distances)
            if scene.change != "hero":
                right["hero unnamed"] = right["hero"]
            if scene.state.prop and scene.change not in ("hero", "prop"):
                right["prop carried"] = right["prop"]
            for name, value in right.items():
                rows.setdefault(name, []).append((value, number))
    return {name: bootstrap(*np.array(pairs).T) for name, pairs in rows.items()}


def is_nearest(world: World, state: State, answer: Conditioning, distances: Distances) -> dict[str, float]:
    """1 or 0 for each fact: whether the true caption is nearer than those of the same scene with another one of it."""
    others = {fact: some for fact, some in world.one_fact_apart(state).items() if some}
    true = distances(answer, [world.caption_of(state)])[0]
    right = {
        fact: float(true < min(distances(answer, [world.caption_of(other) for other in some])))
        for fact, some in others.items()
    }
    return right | {"all facts": min(right.values())}


@torch.no_grad()
def measure_world(world: World, recipe: NearestRecipe) -> dict[str, Interval | None]:
    """Measures a run on held-out stories of a world and prints a line a fact."""
    if not (recipe.run / "adapter").is_dir():
        raise BadInputError(
            f"{recipe.run} holds no adapter/. Give the --out folder of an align or finetune run."
        )
    mapper, _ = load_mapper(recipe.run / "mapper.safetensors")
    folder = Path(recipe.llm) if recipe.llm else default_llm()
    llm = load_adapter(load_llm(folder, mapper.config.vokens), recipe.run / "adapter")
    encode = load_text_encoders(Path(recipe.diffusion)).encode

    def answers(scenes: Sequence[WorldScene]) -> Iterator[Conditioning]:
        turns, cache = [Turn(scene.request, scene.text) for scene in scenes], StoryCache()
        for count in range(1, len(turns) + 1):
            yield mapper(voken_states(llm, turns[:count], cache))

    told = list(islice(stories(world, recipe.seed, "test"), recipe.stories))
    captions = [world.caption_of(scene.state) for one in islice(stories(world, 0), 250) for scene in one]
    found = nearest(world, told, answers, Distances(encode, captions[:MEASURED]))
    print(f"{sum(map(len, told))} scenes of {len(told)} held-out stories: the true caption is the nearest")
    for name, share in found.items():
        print(
            f"  {name:13} {share.mean:.3f} ({share.low:.3f} to {share.high:.3f})"
            if share
            else f"  {name:13} -"
        )
    return found
