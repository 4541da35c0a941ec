"""The layers of a model, as its module tree has them: the children of a list."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Sequence

from torch.fx import Graph, Node

from attnres_rewrite.graph.extent import Extent
from attnres_rewrite.graph.nodes import module_stack, normalise_path
from attnres_rewrite.patterns.operators import is_convolution, is_mixer


@dataclasses.dataclass(eq=False)
class Layer:
    """A module in a list, with what ran of it.

    Attributes:
        first: Its first node.
        path: Its path.
        kind: Its class, or the name of that.
        parts: The paths, within it, of the modules in it that ran.
        streams: Which of the streams have a value or a part of a branch in it.
        convolves: For every mixer in it, whether that is a convolution.
        is_opaque: Whether an operator runs in it that PyTorch does not know the inside of.
    """

    first: Node
    path: str
    kind: object
    parts: set[str] = dataclasses.field(default_factory=set)
    streams: set[int] = dataclasses.field(default_factory=set)
    convolves: set[bool] = dataclasses.field(default_factory=set)
    is_opaque: bool = False

    def is_like(self, other: Layer) -> bool:
        """Whether this is a layer of the same kind, by its class or the better part of its modules, or a hidden one."""
        if not other.parts or self.convolves == {True}:
            return False
        if self.is_opaque or self.kind == other.kind or _are_related(self.kind, other.kind):
            return True
        return 2 * len(self.parts & other.parts) >= len(self.parts | other.parts)


def layer_lists(graph: Graph, extents: Sequence[Extent], live: Container[Node]) -> list[list[Layer]]:
    """The lists of modules in ``graph``, each as those of its children that ran and led to something."""
    layers: dict[str, Layer] = {}
    streams = _streams_of(extents)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or node not in live:
            continue
        stack = module_stack(node)
        for depth, path in enumerate(stack):
            if path.rpartition(".")[2].isdigit():
                layer = layers.setdefault(path, Layer(node, path, _kind(node, path)))
                layer.parts.update(inner.removeprefix(path) for inner in stack[depth + 1 :])
                layer.streams.update(streams.get(node, ()))
                layer.convolves.update([is_convolution(node)] if is_mixer(node) else [])
                layer.is_opaque = layer.is_opaque or _is_foreign(node)
    lists: dict[str, list[Layer]] = collections.defaultdict(list)
    for path, layer in layers.items():
        lists[path.rpartition(".")[0]].append(layer)
    return list(lists.values())


def _streams_of(extents: Sequence[Extent]) -> dict[Node, list[int]]:
    streams: dict[Node, list[int]] = collections.defaultdict(list)
    for number, extent in enumerate(extents):
        for node in extent.accounted:
            streams[node].append(number)
    return streams


def _are_related(mine: object, theirs: object) -> bool:
    """Whether one class is the other one's. An exported program names classes, Dynamo has them."""
    if not (isinstance(mine, type) and isinstance(theirs, type)):
        return False
    return issubclass(mine, theirs) or issubclass(theirs, mine)


def _is_foreign(node: Node) -> bool:
    name = getattr(node.target, "_qualified_op_name", getattr(node.target, "_name", ""))
    return isinstance(name, str) and "::" in name and name.partition("::")[0] not in ("aten", "prims", "attnres")


def _kind(node: Node, path: str) -> object:
    stack = node.meta.get("nn_module_stack") or {}
    return next((kind for inner, kind in stack.values() if normalise_path(inner) == path), None)
