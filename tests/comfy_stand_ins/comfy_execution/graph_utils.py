"""A graph that takes a node's place."""

from typing import Any


def is_link(obj: Any) -> bool:
    """A node's id and the place of its output, as ComfyUI tells links from lists of values."""
    return (
        isinstance(obj, list)
        and len(obj) == 2
        and isinstance(obj[0], str)
        and isinstance(obj[1], int | float)
    )


class Node:
    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.id, self.class_type, self.inputs = id, class_type, inputs

    def out(self, index: int) -> list[Any]:
        return [self.id, index]


class GraphBuilder:
    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = "expanded.0.0." if prefix is None else prefix
        self.nodes: dict[str, Node] = {}

    def node(self, class_type: str, id: str | None = None, **kwargs: Any) -> Node:
        """A new node; for an id that is there already the node that is there, whatever else was asked for."""
        name = self.prefix + (str(len(self.nodes) + 1) if id is None else id)
        return self.nodes.setdefault(name, Node(name, class_type, kwargs))

    def finalize(self) -> dict[str, Any]:
        return {
            name: {"class_type": node.class_type, "inputs": node.inputs} for name, node in self.nodes.items()
        }
