"""What scenes came to, kept beyond ComfyUI's own cache, most of whose modes let go of what an expanded node made.

A result is known by what it follows from: the classes, settings and files of all nodes that lead to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .compat import schema
from .sockets import STORY, VOKENS, StorySoFar, Vokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

log = logging.getLogger("minigpt5")

LIMIT = 512 * 2**20  # bytes: 40 pictures of 1024 x 1024, 2,600 of the storybook's
Link = list[Any]
Results = tuple[list[StorySoFar], list[Vokens]]


class Kept:
    """Results by their key; the ones that were not asked for the longest go when all take more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.results: OrderedDict[str, Results] = OrderedDict()

    def get(self, key: str) -> Results | None:
        """The result, which is asked for now."""
        result = self.results.get(key)
        if result is not None:
            self.put(key, result)
        return result

    def put(self, key: str, result: Results) -> None:
        """Keeps a result as the newest."""
        self.results.pop(key, None)
        self.results[key] = result
        while len(self.results) > 1 and self.size() > self.limit:
            self.results.popitem(last=False)

    def size(self) -> int:
        """Bytes; a picture that many stories share is there once."""
        storages = [
            tensor.untyped_storage() for result in list(self.results.values()) for tensor in _tensors(result)
        ]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def clear(self) -> None:
        self.results.clear()


KEPT = Kept(LIMIT)


def _tensors(result: Results) -> Iterator[Tensor]:
    stories, vokens = result
    yield from (page.picture for story in stories for page in story.pages if page.picture is not None)
    yield from (one.states for one in vokens)


def forget_when_freed() -> None:
    """Lets go of everything when the user has ComfyUI unload models or free its cache, of which packs are not told."""
    from server import PromptServer

    async def on_answer(request: Any, answer: Any) -> None:
        if request.method == "POST" and request.path in ("/free", "/api/free"):
            KEPT.clear()

    if server := getattr(PromptServer, "instance", None):
        server.app.on_response_prepare.append(on_answer)


class Keep(io.ComfyNode):
    """Only the Interleaver makes it: the scene that is kept, or the scene told or drawn now, and kept from then on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5Keep",
            display_name="Keep Scene (MiniGPT-5)",
            category="MiniGPT-5/inside",
            description="Part of the Interleaver, which asks for a scene again only if something that leads to it has "
            "changed.",
            is_input_list=True,  # ComfyUI runs the nodes before it once for each story of a list
            is_dev_only=True,
            inputs=[
                io.String.Input("key", default="", tooltip="What the scene follows from, as a digest."),
                STORY.Input("story", lazy=True),
                VOKENS.Input("vokens", lazy=True, optional=True),
            ],
            outputs=[
                STORY.Output("kept_story", display_name="story", is_output_list=True),
                VOKENS.Output("kept_vokens", display_name="vokens", is_output_list=True),
            ],
        )

    @classmethod
    def check_lazy_status(cls, key: list[str], **values: Any) -> list[str]:
        return [] if KEPT.get(key[0]) else list(values)

    @classmethod
    def execute(
        cls, key: list[str], story: list[StorySoFar], vokens: list[Vokens] | tuple[()] = ()
    ) -> io.NodeOutput:
        result = KEPT.get(key[0])
        if result is None and story[0] is None:
            raise ValueError("The scenes that were kept have just been freed. Press Run again.")
        result = result or (story, list(vokens))
        KEPT.put(key[0], result)
        return io.NodeOutput(*result)


class Keeper:
    """Lays Keep nodes into a graph that the Interleaver builds."""

    def __init__(self, graph: Any, prompt: Any) -> None:
        self.graph, self.prompt = graph, prompt
        self.keys: dict[str, str | None] = {}

    def keep(self, name: str, **links: Link) -> list[Link]:
        """The links through a node that keeps what comes out of them; unchanged if that cannot be known again."""
        key = self.key(next(iter(links.values()))[0])
        if key is None:
            return list(links.values())
        node = self.graph.node("MiniGPT5Keep", name, key=key, **links)
        return [node.out(index) for index in range(len(links))]

    def key(self, node_id: str) -> str | None:
        """What a node's results follow from, or None where ComfyUI itself would not take them for the same again."""
        from comfy_execution.graph_utils import is_link

        if self.prompt is None:
            return None
        if node_id not in self.keys:
            own = self.graph.nodes.get(node_id)
            node = self.prompt.get_node(node_id) if own is None else vars(own)
            inputs = dict(node["inputs"])
            for name, value in inputs.items():  # one frame a node: graphs may be hundreds of nodes deep
                if is_link(value):
                    inputs[name] = [self.key(value[0]) or float("nan"), value[1]]
            self.keys[node_id] = _digest(node, inputs)
        return self.keys[node_id]


def _digest(node: dict[str, Any], inputs: dict[str, Any]) -> str | None:
    try:
        text = json.dumps([node["class_type"], _file_marks(node), inputs], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):  # a value of no plain kind, or NaN: never the same again
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _file_marks(node: dict[str, Any]) -> Any:
    """What the node says of its files; ComfyUI has asked for it already unless it runs with --cache-none."""
    from nodes import NODE_CLASS_MAPPINGS

    kind = NODE_CLASS_MAPPINGS[node["class_type"]]
    if getattr(kind, "NOT_IDEMPOTENT", False):
        return float("nan")
    if "is_changed" in node:
        return node["is_changed"]
    ask = getattr(kind, "IS_CHANGED", None) or getattr(kind, "fingerprint_inputs", None)
    if ask is None:
        return None
    constants = {name: None if isinstance(value, list) else value for name, value in node["inputs"].items()}
    try:
        return [ask(**constants)]
    except NotImplementedError:  # the base class's
        return None
    except Exception as error:  # somebody else's node: as ComfyUI does, say so and run it again
        log.warning(
            "%s cannot say whether it has changed (%s); what follows from it is not kept.", kind, error
        )
        return float("nan")
