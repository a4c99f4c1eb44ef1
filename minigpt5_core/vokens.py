"""Generative vokens: V special tokens that stand for one picture (arXiv 2310.02239, section 3.2)."""

import re

import torch
from torch import Tensor

PICTURE = "[PICTURE]"  # one picture's slot in a prompt; the LLM never reads or writes it
IMAGE_HERE = "<ImageHere>"  # the same in the published checkpoints' prompts
SPECIAL = re.compile(r"\[+(IMG\d+|PICTURE)\]+")


def plain(text: str) -> str:
    """The text without the brackets that would turn a word in it into a voken or a picture's slot."""
    return SPECIAL.sub(r"\1", text)


def voken_strings(count: int) -> list[str]:
    """`[IMG0]` .. `[IMG{count-1}]`."""
    return [f"[IMG{index}]" for index in range(count)]


def block_starts(ids: list[int], voken_ids: list[int]) -> list[int]:
    """Where each whole voken block begins in a sequence of token ids."""
    size = len(voken_ids)
    return [start for start in range(len(ids) - size + 1) if ids[start : start + size] == voken_ids]


def gather_voken_states(hidden: Tensor, starts: list[tuple[int, int]], count: int) -> Tensor:
    """The states that predict each voken, one position before it: (B, S, L) -> (blocks, V, L).

    `starts` holds (row, position of [IMG0]) for every block; a position is at least 1.
    """
    rows = torch.tensor([row for row, _ in starts], dtype=torch.long, device=hidden.device)
    first = torch.tensor([start - 1 for _, start in starts], dtype=torch.long, device=hidden.device)
    positions = first[:, None] + torch.arange(count, device=hidden.device)
    return hidden[rows[:, None], positions]
