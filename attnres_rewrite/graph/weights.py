"""How much the branches of a stream compute, read off the weights that they use."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from attnres_rewrite.graph.extent import extents_of
from attnres_rewrite.graph.nodes import data_inputs, submodule_of, tensor_of
from attnres_rewrite.streams import ResidualStream


def multiply_adds(graph: Graph, stream: ResidualStream) -> int:
    """Multiply-adds a token of all branches of ``stream``: one for every number of a weight that they use.

    What uses a weight twice counts it twice, as layers do that share theirs. Not counted are vectors, such as gains of
    norms, what two activations compute, as in attention, which depends on how long a sequence is, and keys and values
    of another stream. Of routed experts all are counted: the weights do not say how many of them a token goes through.

    Args:
        graph: The graph that holds the stream.
        stream: The stream.
    """
    (extent,) = extents_of(graph, [stream])
    own = extent.inside | extent.values
    total = 0
    for node in extent.inside:
        # A tracer of modules leaves their weights out of the graph.
        if (module := submodule_of(node)) is not None:
            total += sum(p.numel() for p in module.parameters() if p.dim() > 1)
        total += sum(_numbers(source) for source in data_inputs(node) if source not in own)
    return total


def _numbers(node: Node) -> int:
    """How many numbers ``node`` has, if it is a weight of two dimensions or more, or a view, cast or part of one."""
    value, leaf = tensor_of(node), node
    if value is None or value.dim() < 2 or value.dtype == torch.bool:
        return 0
    while len(sources := list(data_inputs(leaf))) == 1:
        (leaf,) = sources
    # Sizes that the trace leaves open are those of inputs.
    if sources or leaf.op not in ("placeholder", "get_attr") or not all(isinstance(n, int) for n in value.shape):
        return 0
    return math.prod(value.shape)
