"""An endless, shuffled stream of a data set's usable rows, shared among processes, that can be gone on with exactly.

`datasets` shuffles and shares; the rows come from our readers. Its own state forgets what stands in the shuffle
buffer, so a stream goes on by reading its epoch again up to where it stood, which decodes no picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from minigpt5_core.errors import BadInputError

from .formats import read
from .records import Broken, Record, Row

BUFFER = 1000  # rows that are held to draw from


def _rows(path: str, layout: str) -> Iterator[dict[str, Row]]:
    for row in read(Path(path), layout):
        yield {"row": row}


@dataclass
class Stream:
    """Rows of `path`, epoch after epoch, each in another order drawn from `seed`; each of `world` processes gets some.

    Broken rows are counted in `skipped` and nothing takes their place.
    """

    path: Path
    layout: str
    seed: int = 0
    rank: int = 0
    world: int = 1
    buffer: int = BUFFER
    epoch: int = 0
    taken: int = 0
    skipped: int = 0
    _data: IterableDataset = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known = {"path": str(self.path), "layout": self.layout}
        data = IterableDataset.from_generator(_rows, gen_kwargs=known)
        self._data = split_dataset_by_node(
            # one source: a pool of threads to read several at once would only cost time
            data.shuffle(seed=self.seed, buffer_size=self.buffer, max_buffer_input_shards=1),
            self.rank,
            self.world,
        )

    def __iter__(self) -> Iterator[Record]:
        while True:
            rest = self._data.skip(self.taken)
            rest.set_epoch(self.epoch)
            usable = self.taken > 0
            for row in rest:
                self.taken += 1
                if isinstance(row["row"], Broken):
                    self.skipped += 1
                    continue
                usable = True
                yield row["row"]
            if not usable:
                raise BadInputError(
                    f"{self.path}: not one row of it is usable. python -m trainer data check {self.path} "
                    f"--format {self.layout} says why."
                )
            self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: in which epoch, and after how many rows of it."""
        return {"epoch": self.epoch, "taken": self.taken, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on right behind where `state` was taken."""
        self.epoch, self.taken, self.skipped = state["epoch"], state["taken"], state["skipped"]
