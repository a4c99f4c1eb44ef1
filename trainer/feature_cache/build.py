"""Fills a feature cache: what of a data set is not there yet is computed and written, shard by shard.

A run that was ended goes on where it stood: Ctrl-C and SIGTERM write what is computed, a kill loses one shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM, load_llm, load_vision
from minigpt5_core.llm.files import default_llm
from minigpt5_core.vision import picture_tensor

from ..common.images import center_crop
from ..common.progress import TrainingError, interrupts
from ..data.check import SHOWN_BROKEN
from ..data.formats import holds_pictures, read
from ..data.records import Broken, BrokenPicture, Picture, Row
from ..diffusion import FrozenDiffusion, lacks_a_denoiser, load_frozen_diffusion, load_text_encoders
from .cache import FeatureCache, FeatureKeys

MOST_BYTES, MOST_VALUES = 64 * 2**20, 4096  # a shard


@dataclass
class Built:
    """What a run found and did. `pictures` and `captions` are the usable ones in the data, repeats and all.

    Of the values they need, `computed` is how many this run made and `there` how many were there by then, from an
    earlier run or another process. `ignored` are the files found that are no whole shards, `shards` all whole ones.
    """

    pictures: int = 0
    captions: int = 0
    computed: int = 0
    there: int = 0
    written: int = 0
    shards: set[Path] = field(default_factory=set)
    broken: list[Broken] = field(default_factory=list)
    ignored: dict[Path, str] = field(default_factory=dict)


def cache_features(
    path: Path,
    layout: str,
    out: Path,
    diffusion: Path,
    llm: Path | None = None,
    image_adapter: Path | None = None,
    precision: str = "float32",
    picture_size: int = 0,
    tokenizer: str = "",
) -> Built:
    """Caches the data set at `path` in the folder `out`, and prints a report.

    Latents and targets are those of the model in `diffusion`, held in `precision`, for pictures of `picture_size`; with
    the `image_adapter` also the image tokens, for the LLM in `llm` (None: the default one), which is loaded for
    nothing else. Where data or model have no pictures there are targets alone, with `tokenizer` as in a recipe.
    BadInputError for data, models or a folder that cannot be used; TrainingError when a shard cannot be written.
    """
    read(path, layout)  # says what is wrong with the path before any model is loaded
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"No folder can be made at {out}: {error}. Name another for --out.") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if lacks_a_denoiser(diffusion) or not holds_pictures(path, layout):
        frozen = load_text_encoders(diffusion, precision, tokenizer)
    else:
        frozen = load_frozen_diffusion(diffusion, precision, picture_size)
    built = fill(path, layout, out, frozen.to(device), load_seeing(llm, image_adapter, device))
    print(summary(built, path, out))
    return built


def load_seeing(
    folder: Path | None, image_adapter: Path | None, device: torch.device | str = "cpu"
) -> FrozenLLM | None:
    """The LLM that sees by the `image_adapter`, or None without one."""
    if image_adapter is None:
        return None
    folder = folder or default_llm()
    return load_vision(load_llm(folder, device=device), folder, chosen=image_adapter)


def fill(
    path: Path,
    layout: str,
    out: Path,
    diffusion: FrozenDiffusion,
    llm: FrozenLLM | None,
    most_values: int = MOST_VALUES,
    most_bytes: int = MOST_BYTES,
) -> Built:
    """Computes and writes what the folder `out` lacks, a shard whenever `most_values` or `most_bytes` are reached.

    Ctrl-C and SIGTERM are raised once all is written.
    """
    filling = Filling(out, diffusion, llm, most_values, most_bytes)
    filling.add_all(read(path, layout))
    return filling.built


class Filling:
    """A cache being filled, row by row; values wait in memory until there are enough for a shard."""

    def __init__(
        self,
        folder: Path,
        diffusion: FrozenDiffusion,
        llm: FrozenLLM | None,
        most_values: int = MOST_VALUES,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.diffusion, self.llm = diffusion, llm
        self.most_values, self.most_bytes = most_values, most_bytes
        self.cache, self.keys = FeatureCache(folder), FeatureKeys(diffusion, llm)
        self.built = Built(ignored=dict(self.cache.ignored))
        self.waiting: dict[str, Tensor] = {}
        self.size = 0  # of those, in bytes
        self.seen: set[str] = set()  # keys this run has met

    def add_all(self, rows: Iterable[Row]) -> None:
        """Adds the rows and writes what they lack; Ctrl-C and SIGTERM end that, and are raised once all is written."""
        with interrupts() as interrupted:
            for row in tqdm(rows, desc="features", unit=" rows", mininterval=5):
                self.add(row)
                if interrupted:
                    break
            self.finish()
        if interrupted:
            raise interrupted[0]

    def add(self, row: Row) -> None:
        """All pictures of a row and their captions, also of those that are only described. A broken picture is named;
        those beside it are cached."""
        if isinstance(row, Broken):
            self.built.broken.append(row)
            return
        for scene in row.scenes:
            if not scene.pictured:
                continue
            try:
                if scene.picture is not None:
                    self._picture(_held(scene.picture))
            except BrokenPicture as error:
                self.built.broken.append(Broken(row.where, str(error)))
                continue
            if scene.shown:
                self._caption(scene.shown)
                self.built.captions += 1

    def finish(self) -> None:
        """The empty caption, which stands in for those that training drops; then writes what waits."""
        if self.built.captions:
            self._caption("")
        self._write()
        self.built.shards = self.cache.shards

    def _picture(self, picture: Picture) -> None:
        latents, tokens = self.keys.latents(picture), self.keys.image_tokens(picture)
        needed = {key for key in (latents, tokens) if key is not None and self._lacks(key)}
        if needed:
            image = picture.open()
            if latents is not None and latents in needed:
                self._keep(latents, self._latents(image))
            if tokens is not None and tokens in needed:
                self._keep(tokens, self._tokens(image))
        self.seen |= {key for key in (latents, tokens) if key is not None}
        self.built.pictures += 1

    def _caption(self, caption: str) -> None:
        tokens, pooled = self.keys.target(caption), self.keys.pooled(caption)
        needed = {key for key in (tokens, pooled) if key is not None and self._lacks(key)}
        if needed:
            answer = self.diffusion.encode([caption])
            if tokens in needed:
                self._keep(tokens, answer.tokens[0])
            if pooled is not None and pooled in needed and answer.pooled is not None:
                self._keep(pooled, answer.pooled[0])
        self.seen |= {tokens} if pooled is None else {tokens, pooled}

    def _lacks(self, key: str) -> bool:
        if key in self.seen:
            return False
        self.built.there += key in self.cache
        return key not in self.cache

    def _latents(self, image: Image.Image) -> Tensor:
        return self.diffusion.latents([center_crop(image, self.keys.side)])[0]

    def _tokens(self, image: Image.Image) -> Tensor:
        assert self.llm is not None
        tokens = self.llm.see(picture_tensor(image))
        assert tokens is not None
        return tokens

    def _keep(self, key: str, value: Tensor) -> None:
        self.waiting[key] = value.cpu()
        self.size += value.nbytes
        self.built.computed += 1
        if self.size >= self.most_bytes or len(self.waiting) >= self.most_values:
            self._write()

    def _write(self) -> None:
        if not self.waiting:
            return
        try:
            self.cache.add(self.waiting)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"a shard of the feature cache could not be written ({error}). What was written before is safe in "
                f"{self.cache.folder}. Make room, then give the same command: it goes on from there."
            ) from error
        self.waiting, self.size = {}, 0
        self.built.written += 1


def _held(picture: Picture) -> Picture:
    """The picture with its file's bytes, so that key and value are of the same ones whoever writes meanwhile."""
    if picture.content is not None:
        return picture
    try:
        return replace(picture, content=Path(str(picture.path)).read_bytes())
    except FileNotFoundError as error:
        raise BrokenPicture(f"{picture.name} is missing") from error
    except OSError as error:
        raise BrokenPicture(f"{picture.name} cannot be read: {error}") from error


def summary(built: Built, path: Path, out: Path) -> str:
    """The report as text."""
    size = sum(shard.stat().st_size for shard in built.shards) / 1e6
    lines = [
        f"{path}: {built.pictures} pictures and {built.captions} captions usable, {len(built.broken)} broken",
        f"{built.computed} features computed, {built.there} already there; {built.written} shards written",
        f"{out}: {len(built.shards)} shards, {size:.1f} MB",
    ]
    lines += [f"ignored  {file.name}: {why}" for file, why in built.ignored.items()]
    lines += [f"broken  {row.where}: {row.why}" for row in built.broken[:SHOWN_BROKEN]]
    if len(built.broken) > SHOWN_BROKEN:
        lines.append(f"... and {len(built.broken) - SHOWN_BROKEN} more broken rows or pictures")
    if not (built.pictures or built.captions):
        lines.append("Nothing here can be trained on.")
    return "\n".join(lines)
