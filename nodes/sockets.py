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
LOSS_MAP = io.Custom("LOSS_MAP")  # ComfyUI's own, which its Plot Loss Graph draws
MAPPER = io.Custom("MINIGPT5_MAPPER")
STORY = io.Custom("MINIGPT5_STORY")
VOKENS = io.Custom("MINIGPT5_VOKENS")


@dataclass(frozen=True, eq=False)
class LoadedLLM:
    """The LLM as ComfyUI manages it: `patcher` holds its weights, and the patches of adapters.

    `frozen` reads the same weights; use it only after `load_models_gpu(patchers)`. `unmerged_lora` are the patchers of
    LoRA that cannot be merged into weights in 4 bits. `adapters` are the names of the adapters on it, and
    `vision_adapter` is the one its image encoder was trained with (empty: the encoder needs none).
    """

    patcher: Any
    frozen: FrozenLLM
    name: str
    weights_hash: str
    adapters: tuple[str, ...] = ()
    vision_adapter: str = ""
    unmerged_lora: tuple[Any, ...] = ()

    @property
    def patchers(self) -> list[Any]:
        """All that ComfyUI has to load before a turn."""
        return [self.patcher, *self.unmerged_lora]

    @property
    def has_vision(self) -> bool:
        """Whether it is shown pictures: the storybook's image encoder works with the storybook's adapter only."""
        return self.frozen.has_vision and (not self.vision_adapter or self.vision_adapter in self.adapters)


@dataclass(frozen=True, eq=False)
class LoadedMapper:
    """A mapper, what its file says about it, and the file's name."""

    mapper: Mapper
    header: MapperHeader
    name: str


@dataclass(frozen=True, eq=False)
class Page:
    """One scene: what was requested, its text, and the picture (H, W, 3) in [0, 1], if there is one.

    `told`: an LLM told it, and its vokens come before the picture; else the page is the user's own. `note` is what
    the user should know of it, such as words that cannot be drawn. `parts`: where the turn asked for several pictures,
    the text of each; the page is all of them until a second picture comes.
    """

    request: str
    text: str
    picture: Tensor | None = None
    told: bool = False
    note: str = ""
    parts: tuple[str, ...] = ()

    def with_picture(self, picture: Tensor, note: str = "") -> tuple[Page, ...]:
        """The page with a picture; two pages where it has one and its turn asked for more.

        As the command line has it: a reply with several pictures is as many scenes.
        """
        if self.picture is None or len(self.parts) < 2:
            return (replace(self, picture=picture, note=f"{self.note} {note}".strip()),)
        text = " ".join(filter(None, self.parts[1:]))
        rest = replace(self, request="", text=text, picture=picture, note=note, parts=self.parts[1:])
        return replace(self, text=self.parts[0], parts=()), rest


@dataclass(frozen=True, eq=False)
class StorySoFar:
    """What a STORY socket carries: the opening that was asked for, and the pages so far."""

    prompt: str
    pages: tuple[Page, ...] = ()
    seed: int = 0

    def with_page(self, page: Page) -> StorySoFar:
        """The story with one page more."""
        return replace(self, pages=(*self.pages, page))

    def with_picture(self, picture: Tensor, note: str = "") -> StorySoFar:
        """The story with a picture (H, W, 3) on its last page, or behind it, and what is to be said of it."""
        return replace(self, pages=(*self.pages[:-1], *self.pages[-1].with_picture(picture, note)))


@dataclass(frozen=True, eq=False)
class Vokens:
    """Voken states (k, V, L) of the k pictures that a turn asked for, and the LLM they come from."""

    states: Tensor
    llm: str
    weights_hash: str
