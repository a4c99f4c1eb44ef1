"""A prompt: token ids with pictures in their slots, embedded as one sequence.

Shape letters: A axes of a position (1, or 3 for multimodal rotary positions), K image tokens, L llm width,
W width of what stands in the sequence (L, or more where a family tells its decoder more about a picture).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..llm.families.base import placed
from ..llm.frozen import FrozenLLM


@dataclass(frozen=True)
class Prompt:
    """Token ids; each `image_id` among them is one picture's slot, replaced by that picture's (K, W) tokens."""

    ids: list[int]
    images: list[Tensor] = field(default_factory=list)
    image_id: int | None = None

    @property
    def length(self) -> int:
        """How many positions it takes, a picture counted with all its tokens."""
        return len(self.ids) + sum(len(image) - 1 for image in self.images)

    @property
    def spread(self) -> list[int]:
        """The ids with each picture's slot repeated for all of its tokens."""
        images = iter(self.images)
        return [
            token
            for slot in self.ids
            for token in ([slot] * len(next(images)) if slot == self.image_id else [slot])
        ]


def embed_prompt(llm: FrozenLLM, prompt: Prompt) -> Tensor:
    """(positions, W): the embedded ids, with pictures' tokens in their slots."""
    words = [0 if token == prompt.image_id else token for token in prompt.ids]  # a slot has no embedding
    embedded = llm.family.widen(llm.embed(torch.tensor([words], device=llm.device))[0])
    images = iter(prompt.images)
    pieces = [
        next(images).to(embedded)
        if prompt.image_id is not None and token == prompt.image_id
        else embedded[index : index + 1]
        for index, token in enumerate(prompt.ids)
    ]
    return torch.cat(pieces)


def prompt_positions(llm: FrozenLLM, prompt: Prompt) -> Tensor:
    """(A, positions) position ids of a prompt, counted from its own beginning."""
    ids = prompt.spread
    return llm.family.positions(len(ids), list(placed(ids, prompt.images, prompt.image_id)))


def position_keys(prompt: Prompt) -> list:
    """What stands at each position, for comparing prompts: a token id, or a picture's content and row."""
    images = iter(prompt.images)
    keys: list = []
    for token in prompt.ids:
        if prompt.image_id is not None and token == prompt.image_id:
            image = next(images)
            digest = hash(image.detach().float().cpu().numpy().tobytes())
            keys.extend((digest, row) for row in range(len(image)))
        else:
            keys.append(token)
    return keys
