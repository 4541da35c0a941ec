"""Something is added to the stream that does not compute from it."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from attnres_rewrite.graph import is_float_tensor, require_tensor, same_shape
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.residual_add import is_add


@dataclasses.dataclass(frozen=True)
class BiasMatch:
    """The stream, and what is added to it."""

    source: Node
    bias: Node


class StreamBias:
    """A vector over channels, or anything else that is broadcast over the stream, is added to it.

    ::

        x ─► (+ b) ─► the stream goes on, biased

    The bias joins the partial of the block in progress, and so stays a part of the sum of all sources. That it
    does not depend on the stream (which would make it a branch output) is for the caller to check.
    """

    name = "stream bias"

    def match(self, node: Node) -> BiasMatch | Rejection:
        """The operands of the add ``node``, the one with the node's own shape first."""
        if not is_add(node) or len(node.args) != 2 or node.kwargs:
            return Rejection("not a plain add", node)
        if not all(is_float_tensor(operand) for operand in (node, *node.args)):
            return Rejection("an operand is not a float tensor", node)
        result = require_tensor(node)
        wide = [same_shape(require_tensor(operand), result) for operand in node.args]
        if wide[0] == wide[1]:
            return Rejection("no operand is broadcast over the other", node)
        source, bias = node.args if wide[0] else node.args[::-1]
        assert isinstance(source, Node)
        assert isinstance(bias, Node)
        return BiasMatch(source, bias)
