"""What of a graph belongs to a stream: its values, what is added to them, and what lies within its branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch.fx import Graph, Node

from attnres_rewrite.graph.memory import overwritten_by, writers_of
from attnres_rewrite.graph.nodes import data_inputs, indices
from attnres_rewrite.streams import ResidualStream


def terms_of(stream: ResidualStream) -> list[Node]:
    """The nodes that are added to it: its branch outputs and its biases."""
    return [addend.node for step in stream.steps for addend in step.addends if addend.kind != "value"]


@dataclasses.dataclass(frozen=True)
class Extent:
    """The part of a graph that belongs to one stream.

    Attributes:
        stream: The stream.
        values: The nodes of its values.
        inside: What computes from one of its values, and from which something computes that is added to it.
        feeding: What that computes from, back to the stream, whether it computes from a value or not.
    """

    stream: ResidualStream
    values: frozenset[Node]
    inside: frozenset[Node]
    feeding: frozenset[Node]

    @property
    def accounted(self) -> frozenset[Node]:
        """What is rewritten: all but the root, which may itself be the last add of something that was not found."""
        return (self.values | self.inside) - {self.stream.root}


def extents_of(graph: Graph, streams: Iterable[ResidualStream]) -> list[Extent]:
    """The extent of every stream of ``graph``; the cost is that of the part of the graph between root and end."""
    nodes, index, writers = list(graph.nodes), indices(graph), writers_of(graph)
    return [_extent(stream, nodes, index, writers) for stream in streams]


def _extent(
    stream: ResidualStream, nodes: list[Node], index: dict[Node, int], writers: Mapping[Node, list[Node]]
) -> Extent:
    on_stream, terms, start = stream.values, terms_of(stream), index[stream.root]
    feeding, pending = set(terms), list(terms)
    while pending:
        node = pending.pop()
        # What is written into a tensor counts as well as what the tensor was made from.
        for source in (*data_inputs(node), *writers.get(node, ())):
            if source not in feeding and source not in on_stream and index[source] > start:
                feeding.add(source)
                pending.append(source)
    computing = set(on_stream)
    for node in nodes[start : max(index[term] for term in terms) + 1]:
        if any(source in computing for source in data_inputs(node)):
            computing.add(node)
            computing.update(written for written in overwritten_by(node) if written not in on_stream)
    return Extent(stream, on_stream, frozenset(computing & feeding), frozenset(feeding))
