"""What the text encoder of a CLIP socket answers to captions: what a mapper is trained to answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths

from .sockets import LoadedLLM, LoadedMapper

if TYPE_CHECKING:
    from torch import Tensor

    from ..minigpt5_core.conditioning import Conditioning, Space
    from ..minigpt5_core.conditioning.fit import Targets

log = logging.getLogger("minigpt5")

CAPTION = "{caption}"  # in a style, the caption's place
ODD = 8  # answers of another length before the encoder is taken for one that pads nothing
KNOWN_EXTRAS = {"pooled_output", "hooks", "clip_start_percent", "clip_end_percent"}
_UNEVEN = (
    "This CLIP answers to captions with other numbers of tokens than to an empty text ({}): either the captions are "
    "longer than it reads at once (75 tokens or so), then shorten them or the style; or its answers are as long as the "
    "text, and such text encoders are not supported. Those of SD 1.5, SD 2.x, SDXL, SD3 and Flux are."
)


class TextEncoder:
    """A CLIP socket, asked by ComfyUI's own encoding, in a style."""

    def __init__(self, clip: Any, style: str, mapper: LoadedMapper | None) -> None:
        from ..minigpt5_core.conditioning import Conditioning
        from ..minigpt5_core.conditioning.fit import space_of_answers

        if clip is None:
            raise ValueError(
                "CLIP is empty: this checkpoint brings no text encoder. Load one with Load CLIP."
            )
        self.clip, self.style = clip, style
        empty = self._encode("")
        self.space: Space = mapper.header.space if mapper else space_of_answers(empty)
        self.pools = self.space.pooled_width is not None
        self.empty = Conditioning(empty.tokens, empty.pooled if self.pools else None)

    def check(self, llm: LoadedLLM, mapper: LoadedMapper | None) -> None:
        """ValueError when an earlier mapper is for another LLM or text encoder."""
        from ..minigpt5_core.conditioning.fit import Targets, check_start

        if mapper is not None:
            check_start(
                mapper.mapper.config, len(llm.frozen.voken_ids), llm.frozen.width, Targets(self.empty)
            )

    def targets(
        self, states: Tensor, captions: list[str], tick: Callable[[str], None]
    ) -> tuple[Tensor, list[int], Targets]:
        """The states whose captions are no longer than the encoder reads at once, each one's row, and the answers."""
        from ..minigpt5_core.conditioning.fit import Targets

        targets = Targets(self.empty, self._scratch())
        rows: dict[str, int | None] = {}
        for caption in captions:
            if caption not in rows:
                rows[caption] = self._add(caption, targets)
                tick(f"CLIP reads its caption {len(rows)}")
                _check_lengths(len(rows) - len(targets), len(targets), targets.token_shape[0])
        if not len(targets):
            raise ValueError(_UNEVEN.format(targets.token_shape[0]))
        used = [row for row, caption in enumerate(captions) if rows[caption] is not None]
        if odd := len(rows) - len(targets):
            log.warning("%d captions are longer than the text encoder reads at once, and left out.", odd)
        return states[used], [rows[captions[row]] for row in used], targets

    def _add(self, caption: str, targets: Targets) -> int | None:
        """The answer's row; None for one of another length."""
        from ..minigpt5_core.conditioning import Conditioning

        answer = self._encode(self.style.replace(CAPTION, caption))
        if answer.tokens.shape[1] != targets.token_shape[0]:
            return None
        try:
            targets.add(Conditioning(answer.tokens, answer.pooled if self.pools else None))
        except OSError as error:
            raise ValueError(
                f"The text encoder's answers cannot be kept in {folder_paths.get_temp_directory()}: {error.strerror}. "
                "Free some space there, or set scenes lower."
            ) from error
        return len(targets) - 1

    def _encode(self, text: str) -> Conditioning:
        """What a sampler would be given for this text."""
        from ..minigpt5_core.conditioning import Conditioning

        tokens, extra = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0]
        if strange := sorted(set(extra) - KNOWN_EXTRAS):
            raise ValueError(
                f"This CLIP answers with more than tokens and a pooled vector: {', '.join(strange)}. Such text "
                "encoders are not supported; those of SD 1.5, SD 2.x, SDXL, SD3 and Flux are."
            )
        pooled = extra.get("pooled_output")
        # with --gpu-only it stays there, and what it is compared with is kept in memory or on the disk
        return Conditioning(tokens.cpu(), None if pooled is None else pooled.cpu())

    def _scratch(self) -> Path:
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _check_lengths(odd: int, even: int, tokens: int) -> None:
    if odd > max(ODD, even):
        raise ValueError(_UNEVEN.format(tokens))
