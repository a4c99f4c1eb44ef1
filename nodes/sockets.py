"""What travels between our nodes. Objects are never changed after they were made: ComfyUI keeps and shares them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

if TYPE_CHECKING:
    from torch import Tensor

    from ..minigpt5_core.conditioning.mapper import Mapper
    from ..minigpt5_core.conditioning.mapper_file import MapperHeader
    from ..minigpt5_core.llm import FrozenLLM

LLM = io.Custom("MINIGPT5_LLM")
MAPPER = io.Custom("MINIGPT5_MAPPER")
STORY = io.Custom("MINIGPT5_STORY")
VOKENS = io.Custom("MINIGPT5_VOKENS")


@dataclass(frozen=True, eq=False)
class LoadedLLM:
    """The LLM as ComfyUI manages it: `patcher` holds its weights (and what an adapter lays over them).

    `frozen` reads the same weights; it is to be used only after `load_models_gpu(patchers)`. `beside` hold the LoRA
    that goes beside weights in 4 bits. `adapters` are the names of those laid over it, and `eyes_for` is the one its
    image encoder was trained with (empty: the encoder is the LLM's own).
    """

    patcher: Any
    frozen: FrozenLLM
    name: str
    weights_hash: str
    adapters: tuple[str, ...] = ()
    eyes_for: str = ""
    beside: tuple[Any, ...] = ()

    @property
    def patchers(self) -> list[Any]:
        """All that ComfyUI is to load before a turn."""
        return [self.patcher, *self.beside]

    @property
    def sees(self) -> bool:
        """Whether it is shown pictures: the storybook's eyes speak to the storybook's adapter only."""
        return self.frozen.sees and (not self.eyes_for or self.eyes_for in self.adapters)


@dataclass(frozen=True, eq=False)
class LoadedMapper:
    """A mapper, what its file says about it, and the file's name."""

    mapper: Mapper
    header: MapperHeader
    name: str


@dataclass(frozen=True, eq=False)
class Page:
    """One scene: what was asked for, what was told, and the picture (H, W, 3) in [0, 1], if there is one.

    `told` by an LLM, whose vokens stand in front of the picture; else the page is the user's own.
    """

    request: str
    text: str
    picture: Tensor | None = None
    told: bool = False


@dataclass(frozen=True, eq=False)
class StorySoFar:
    """What a STORY socket carries: the opening that was asked for, and the pages so far."""

    prompt: str
    pages: tuple[Page, ...] = ()
    seed: int = 0

    def with_page(self, page: Page) -> StorySoFar:
        """The story with one page more."""
        return replace(self, pages=(*self.pages, page))

    def with_picture(self, picture: Tensor) -> StorySoFar:
        """The story with a picture (H, W, 3) on its last page."""
        return replace(self, pages=(*self.pages[:-1], replace(self.pages[-1], picture=picture)))


@dataclass(frozen=True, eq=False)
class Vokens:
    """Voken states (k, V, L) of the k pictures that a turn asked for, and the LLM they come from."""

    states: Tensor
    llm: str
    weights_hash: str
