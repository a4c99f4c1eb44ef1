"""Presets: how a story is worded for the LLM, how its replies are sampled, and how pictures are drawn and encoded.

`published_*` are the settings of the published code (model.py and examples/playground.py of
github.com/UCSB-AI/MiniGPT-5); `default` adds what its users missed: text before each picture, several pictures in a
reply, no heavy penalty on repeated words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..generate.row import Reply
from ..generate.sampling import Sampling
from ..llm.frozen import FrozenLLM
from ..vision.pictures import white_square
from .prompts import CHAT, Turn, Wording
from .published_prompts import CC3M, MMDIALOG, VIST


@dataclass(frozen=True)
class Preset:
    """`wording` None: VIST's for a converted published checkpoint, the LLM's own chat template for any other.

    `padded`: the LLM is shown pictures whole, in a white square; else its image encoder takes their middle square.
    `steps` and `guidance` are those of the diffusion model.
    """

    sampling: Sampling
    wording: Wording | None = None
    padded: bool = False
    steps: int = 25
    guidance: float = 7.5

    def wording_for(self, llm: FrozenLLM) -> Wording:
        """The wording for this LLM."""
        return self.wording or (CHAT if llm.bos_id is None else VIST)

    def sampling_for(self, llm: FrozenLLM, turns: Sequence[Turn]) -> Sampling:
        """How the reply to the last turn is sampled: where only a picture is wanted, its block is the whole reply."""
        wording, sampling = self.wording_for(llm), self.sampling
        if sampling.pictures == "after_text" and wording.illustrates(turns):
            sampling = replace(sampling, pictures="first", max_pictures=1, max_new_tokens=1)
        return replace(sampling, stop_strings=(*sampling.stop_strings, *wording.stops))

    def told(self, llm: FrozenLLM, turns: Sequence[Turn], reply: Reply) -> str:
        """The text of a reply to the last turn; where it has none and the request was the scene itself, the request."""
        return reply.text or (turns[-1].request if self.wording_for(llm).illustrates(turns) else "")

    def see(self, llm: FrozenLLM, picture: Tensor) -> Tensor | None:
        """(H, W, 3) in [0, 1] -> (K, W) image tokens; None for an LLM without vision."""
        return llm.see(white_square(picture) if self.padded else picture)


# [IMG0] comes when the model samples it, and only the first picture is drawn. The penalty counts what was generated and
# the bos token that transformers 4.31 put before it, id 0 in that Vicuna's settings; it never counts the prompt.
_PUBLISHED = Sampling(
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    repetition_penalty=2.0,
    max_new_tokens=256,
    pictures="when_asked",
    penalised_prefix=(0,),
    stray_vokens=True,
)
_STORYBOOK = Sampling(temperature=0.7, top_p=0.9, top_k=50, max_new_tokens=60)
_DEFAULT = Sampling(temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, max_pictures=4)

PRESETS = {
    "storybook": Preset(_STORYBOOK, steps=20, guidance=3.0),
    "default": Preset(_DEFAULT),
    "published_vist": Preset(_PUBLISHED, VIST, padded=True, steps=50),
    "published_mmdialog": Preset(_PUBLISHED, MMDIALOG, padded=True, steps=50),
    "published_cc3m": Preset(_PUBLISHED, CC3M, steps=50),
}
STORYBOOK, DEFAULT = PRESETS["storybook"], PRESETS["default"]
