"""What the storybook's text-to-image model is trained on: pictures as latents, encoded once, with their texts."""

import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ...common.images import encode_pictures
from ..world.render import render_with_figures
from ..world.state import State
from ..world.stories import stories, training_state
from .diffusion_model import DiffusionRecipe


@dataclass(frozen=True)
class Scenes:
    """Pictures as scaled latents (N, 4, 16, 16), each with its full caption and a story's sentence.

    `figures` (N, 1, 16, 16) is 1 where a cell shows hero, prop or companion, else 0.
    """

    latents: Tensor
    figures: Tensor
    states: list[State]
    sentences: list[str]

    def texts(self, rows: list[int], recipe: DiffusionRecipe, rng: random.Random) -> list[str]:
        """A text for each row: mostly the caption, sometimes the sentence, sometimes nothing."""
        chosen = []
        for row in rows:
            uniform = rng.random()
            if uniform < recipe.empty_share:
                chosen.append("")
            elif uniform < recipe.empty_share + recipe.sentence_share:
                chosen.append(self.sentences[row])
            else:
                chosen.append(self.states[row].caption())
        return chosen


@torch.no_grad()
def encode_scenes(vae: AutoencoderTiny, count: int, seed: int) -> Scenes:
    """Draws `count` scenes, half from stories, half with any state, and encodes them once."""
    rng = random.Random(f"pictures/{seed}")
    scenes_of_stories = (scene for story in stories(seed) for scene in story)
    items: list[tuple[State, str]] = []
    while len(items) < count:
        scene = next(scenes_of_stories)
        items.append((scene.state, scene.text))
        state = training_state(rng)
        items.append((state, state.caption()))
    latents, figures = [], []
    for first in range(0, count, 16):
        rendered = [render_with_figures(state, rng) for state, _ in items[first : first + 16]]
        latents.append(encode_pictures(vae, [picture for picture, _ in rendered]))
        figures += [torch.from_numpy(cells)[None].float() for _, cells in rendered]
    return Scenes(
        torch.cat(latents), torch.stack(figures), [item[0] for item in items], [item[1] for item in items]
    )
