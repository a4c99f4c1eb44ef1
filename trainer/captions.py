"""Captions in front of voken blocks, with their keys and values computed once.

In stage 1 the caption comes before the vokens and the LLM is frozen, so the caption's keys and values carry no
gradient: they are computed once without it, and a training step runs the voken block alone.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from minigpt5_core.llm import FrozenLLM
from minigpt5_core.prompts import Turn, chat_text


@dataclass
class Bucket:
    """Captions whose prompts have the same length: keys and values per layer (n, heads, S, d), last states (n, L)."""

    captions: list[str]
    layers: list[tuple[Tensor, Tensor]]
    last: Tensor

    def past(self, rows: list[int]) -> DynamicCache:
        """The keys and values of some rows, ready for a forward."""
        return DynamicCache([(keys[rows].float(), values[rows].float()) for keys, values in self.layers])


class CaptionCache:
    """All captions' keys and values, in buckets of equal length, so that no batch needs padding."""

    def __init__(
        self, llm: FrozenLLM, captions: Sequence[str], batch: int = 16, dtype: torch.dtype = torch.float32
    ):
        self.llm = llm
        by_length: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        for caption in captions:
            ids = caption_ids(llm, caption)
            by_length[len(ids)].append((caption, ids))
        bar = tqdm(total=len(captions), desc="captions", mininterval=5)
        self.buckets = [self._fill(items, batch, dtype, bar) for _, items in sorted(by_length.items())]
        bar.close()

    @torch.no_grad()
    def _fill(self, items: list, batch: int, dtype: torch.dtype, bar: tqdm) -> Bucket:
        parts, last = [], []
        for first in range(0, len(items), batch):
            ids = torch.tensor([item[1] for item in items[first : first + batch]], device=self.llm.device)
            output = self.llm.decoder(inputs_embeds=self.llm.embed(ids), use_cache=True)
            parts.append(
                [(layer.keys.to(dtype), layer.values.to(dtype)) for layer in output.past_key_values.layers]
            )
            last.append(output.last_hidden_state[:, -1])
            bar.update(len(ids))
        layers = [
            (torch.cat([part[i][0] for part in parts]), torch.cat([part[i][1] for part in parts]))
            for i in range(len(parts[0]))
        ]
        return Bucket([item[0] for item in items], layers, torch.cat(last))

    def draw(self, batch: int, chance: random.Random) -> tuple[Bucket, list[int]]:
        """A bucket, drawn by its size, and `batch` of its rows."""
        bucket = chance.choices(self.buckets, [len(b.captions) for b in self.buckets])[0]
        return bucket, chance.choices(range(len(bucket.captions)), k=batch)


def caption_ids(llm: FrozenLLM, caption: str) -> list[int]:
    """The ids up to where [IMG0] is predicted: the caption as a request, the reply still empty."""
    return llm.encode(chat_text(llm, [Turn(caption)]))


def block_states(llm: FrozenLLM, bucket: Bucket, rows: list[int]) -> Tensor:
    """Voken states (B, V, L) behind cached captions; the gradient reaches the voken rows only.

    The state that predicts [IMG0] is the caption's last one, so only [IMG0] .. [IMG(V-2)] are run.
    """
    ids = torch.tensor(llm.voken_ids[:-1], device=llm.device).expand(len(rows), -1)
    length = bucket.layers[0][0].shape[2]
    positions = torch.arange(length, length + ids.shape[1], device=llm.device)[None]
    output = llm.decoder(
        inputs_embeds=llm.embed(ids),
        past_key_values=bucket.past(rows),
        position_ids=positions,
        use_cache=True,
    )
    return torch.cat((bucket.last[rows][:, None], output.last_hidden_state), 1)
