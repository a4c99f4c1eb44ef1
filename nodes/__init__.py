"""The nodes: the only place that knows ComfyUI. Nothing heavy is imported before a node runs."""

from comfy_api.latest import ComfyExtension, io

from . import folders, keeping
from .conditioning import LoadMapper, VokensToConditioning
from .diffusers_models import LoadDiffusers
from .interleaver import Interleaver
from .llm import LoadAdapter, LoadLLM
from .show import SaveStory, StoryParts, ViewStory
from .story import AddPicture, LoadStory, StartStory
from .training import TrainMapper
from .turn import StoryTurn

NODES: list[type[io.ComfyNode]] = [
    LoadLLM,
    LoadAdapter,
    LoadMapper,
    LoadDiffusers,
    StartStory,
    LoadStory,
    StoryTurn,
    VokensToConditioning,
    AddPicture,
    Interleaver,
    StoryParts,
    ViewStory,
    SaveStory,
    TrainMapper,
    keeping.Keep,
]


class MiniGPT5Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()
        keeping.forget_when_freed()
        return NODES
