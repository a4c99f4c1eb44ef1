"""What frozen models answer about a data set, on disk: computed once, read in every training after.

    python -m trainer data cache PATH --format FORMAT --out FOLDER

A key stands for everything that a value follows from: the model's weights and settings, what is done to the picture
before, and the picture file's bytes or the caption's tokens. So a changed picture or another model finds nothing,
never a stale value, and two equal pictures share one. Values are what training itself would compute: scaled latents
(of an AutoencoderKL's posterior, the mode), image tokens, text encoder's answers, each as its model gives it, in the
precision it is loaded in, so that losses stay the same. They are computed one by one, and so
follow from nothing but what the key stands for; in a batch of another size, a latent moves by some 1e-6.

Shards are safetensors files with a tensor a key; each is written whole beside its place and moved there, under a
name that follows from its keys. Any number of processes may write and read a folder at once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minigpt5_core.conditioning import Conditioning
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import FrozenLLM
from minigpt5_core.llm.families.base import VisionFamily
from minigpt5_core.tensor_files import atomic_save

from ..data.records import BrokenPicture, Picture
from ..diffusion.base import FrozenDiffusion

VERSION = "1"  # to be raised where the same key would stand for another value
MARK = "minigpt5.features"  # in a shard's header
REMEMBERED = 2**18  # files whose hashes are remembered, at some 300 bytes each
PASSING = ("transformers_version", "dtype", "torch_dtype", "architectures")  # settings no answer follows from


class FeatureCache:
    """A folder of shards, each opened when one of its values is first asked for and mapped from then on.

    In memory is one entry a value, some 200 bytes. `ignored` says which files are no whole shards, and why.
    BadInputError when there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadInputError(
                f"{folder} is no folder, so no feature cache. Make one: python -m trainer data cache PATH "
                f"--format FORMAT --out {folder}"
            )
        self.folder = folder
        self.ignored: dict[Path, str] = {}
        self.shards: set[Path] = set()
        self._places: dict[str, Path] = {}  # key -> shard
        self._opened: dict[Path, Any] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> Tensor | None:
        """The value of a key in a memory of its own; None where there is none, or its shard is gone by now."""
        if (shard := self._places.get(key)) is None:
            return None
        try:
            if shard not in self._opened:
                self._opened[shard] = safe_open(shard, framework="pt")
            return self._opened[shard].get_tensor(key).clone()
        except (OSError, SafetensorError) as error:
            self._forget(shard, str(error))
            return None

    def add(self, values: dict[str, Tensor]) -> Path:
        """Writes values as one shard, and returns its path. OSError or SafetensorError where that cannot be done."""
        name = hashlib.sha256("".join(sorted(values)).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        atomic_save(values, path, {"format": "pt", MARK: VERSION})
        self.refresh()
        return path

    def refresh(self) -> None:
        """Takes in the shards that have come since, this process's and those of others."""
        self.ignored = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self.shards:
                self._take(path)

    def _take(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:  # compares the file's length with its header
                keys, marks = shard.keys(), shard.metadata() or {}
        except (OSError, SafetensorError) as error:
            self.ignored[path] = f"no whole safetensors file: {error}"
            return
        if marks.get(MARK) != VERSION:
            self.ignored[path] = f"no shard of a feature cache of version {VERSION}"
            return
        self._places |= dict.fromkeys(keys, path)
        self.shards.add(path)

    def _forget(self, shard: Path, why: str) -> None:
        self.ignored[shard] = why
        self.shards.discard(shard)
        self._places = {key: place for key, place in self._places.items() if place != shard}


class FeatureKeys:
    """The keys of pictures and captions with these models, whose weights are read here, once.

    The models must stay as they are: nothing is noticed of a training that changes them.
    """

    def __init__(self, diffusion: FrozenDiffusion, llm: FrozenLLM | None = None) -> None:
        self.token_ids = diffusion.token_ids
        self.pools, self.vae = diffusion.pools, None
        if diffusion.draws:
            self.side, vae = diffusion.side, diffusion.pipeline.vae
            self.vae = fingerprint(vae, dict(vae.config))
        encoders = [fingerprint(part, part.config.to_dict()) for part in diffusion.text_encoders()]
        self.text_encoder = " ".join([*encoders, *filter(None, [diffusion.answer_settings])])
        self.vision = None if llm is None else _vision_fingerprint(llm)

    def latents(self, picture: Picture) -> str | None:
        """None for a model that does not draw; BrokenPicture when the picture's file cannot be read."""
        if self.vae is None:
            return None
        return picture_key(
            "latents", self.vae, f"as seen, middle square of {self.side} pixels, mode", picture
        )

    def image_tokens(self, picture: Picture) -> str | None:
        """None for an LLM that does not see; BrokenPicture when the file cannot be read."""
        return (
            None
            if self.vision is None
            else picture_key("image tokens", self.vision, "as seen, whole", picture)
        )

    def target(self, caption: str) -> str:
        """By what the tokenizers make of the caption, which is all that the text encoders learn of it."""
        return caption_key(self.text_encoder, self.token_ids(caption))

    def pooled(self, caption: str) -> str | None:
        """Of the same answer, the pooled vector; None where the model has none."""
        return _key("pooled", self.target(caption)) if self.pools else None


def _vision_fingerprint(llm: FrozenLLM) -> str | None:
    """Stands for all that decides what the LLM sees in a picture; None for one that does not see."""
    if (encoder := llm.image_encoder) is not None:
        return fingerprint(encoder, dataclasses.asdict(encoder.config))
    if isinstance(family := llm.family, VisionFamily):
        return fingerprint(family.vision(llm.causal_lm), family.processor)
    return None


class CachedFeatures:
    """A cache as training reads it. None: not in the cache, to be computed; `found` and `missed` count both.

    A cache of other models is no error, it has none of the answers: then `found` stays 0.
    """

    def __init__(self, folder: Path, diffusion: FrozenDiffusion, llm: FrozenLLM | None = None) -> None:
        self.cache = FeatureCache(folder)
        self.keys = FeatureKeys(diffusion, llm)
        self.found = self.missed = 0

    def summary(self) -> str:
        """How much of what was asked for it had, and what to do when that is nothing."""
        if self.found:
            return f"cache: {self.found} values found, {self.missed} computed"
        return (
            f"cache: nothing of what was asked for is in {self.cache.folder}. It was made for other data, or for "
            "another model: python -m trainer data cache with the --diffusion, --diffusion-precision and "
            "--picture-size of this training."
        )

    def latents(self, picture: Picture) -> Tensor | None:
        """(C, h, w): scaled latents of the middle square, as `encode_pictures` gives them."""
        return self._picture(self.keys.latents, picture)

    def image_tokens(self, picture: Picture) -> Tensor | None:
        """(K, W): what `FrozenLLM.see` gives."""
        return self._picture(self.keys.image_tokens, picture)

    def target(self, caption: str) -> Conditioning | None:
        """The text encoders' answer, tokens (T, C) and where there is one pooled (P,)."""
        tokens = self._get(self.keys.target(caption))
        pooled = self._get(self.keys.pooled(caption)) if self.keys.pools else None
        if tokens is None or (self.keys.pools and pooled is None):
            return None
        return Conditioning(tokens, pooled)

    def _picture(self, key: Callable[[Picture], str | None], picture: Picture) -> Tensor | None:
        try:
            return self._get(key(picture))
        except BrokenPicture:  # whoever then opens it is told
            return self._get(None)

    def _get(self, key: str | None) -> Tensor | None:
        value = None if key is None else self.cache.get(key)
        self.found += value is not None
        self.missed += value is None
        return value


def picture_key(kind: str, model_fingerprint: str, preprocessing: str, picture: Picture) -> str:
    """32 hexadecimal digits; BrokenPicture when the picture's file cannot be read."""
    return _key(kind, model_fingerprint, preprocessing, picture_hash(picture))


def caption_key(model_fingerprint: str, ids: Sequence[Sequence[int]]) -> str:
    """32 hexadecimal digits, from the ids that each tokenizer gives."""
    return _key("target", model_fingerprint, ids)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:32]


def picture_hash(picture: Picture) -> str:
    """The sha256 of a picture's bytes, not decoded. A file is read once, until its size or time of change is another.

    BrokenPicture when it cannot be read.
    """
    if picture.content is not None:
        return hashlib.sha256(picture.content).hexdigest()
    path = Path(str(picture.path))
    try:
        found = path.stat()
        return _file_hash(path, found.st_size, found.st_mtime_ns)
    except FileNotFoundError as error:
        raise BrokenPicture(f"{picture.name} is missing") from error
    except OSError as error:
        raise BrokenPicture(f"{picture.name} cannot be read: {error}") from error


@lru_cache(maxsize=REMEMBERED)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """Stands for all of a model's weights and buffers, bit by bit, and for its settings, but not for where it lies."""
    told = {name: value for name, value in settings.items() if name[0] != "_" and name not in PASSING}
    digest = hashlib.sha256(json.dumps([type(model).__name__, told], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
