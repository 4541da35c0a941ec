"""A sum of stream values with weights of any kind, as a head has it that mixes the outputs of all layers."""

from __future__ import annotations

from collections.abc import Container

from torch.fx import Node

from attnres_rewrite.graph.nodes import is_float_tensor
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_sum import LinearSum
from attnres_rewrite.patterns.stream_scale import is_product
from attnres_rewrite.patterns.transparent import through_transparent


class Mixture:
    """A sum of which every term is a value of a stream, times weights or not, whatever these compute from.

    ::

        w_0 * x_0 ─► (+) ─► (+) ─► ... ─► o
                      │      │
              w_1 * x_1   w_2 * x_2

    It adds no sublayer, so it is no residual connection, gated or not. Where a sublayer goes on from it, the model
    attends over depth (:mod:`~attnres_rewrite.patterns.depth_attention`); after the last layer it is a head's.
    """

    name = "mixture"

    def match(self, node: Node, values: Container[Node]) -> list[Node] | Mismatch:
        """The stream values of which ``node`` is the sum.

        Args:
            node: The sum, which may be a value itself.
            values: All values of the streams, their roots among them.
        """
        if isinstance(match := LinearSum().match(node), Mismatch):
            return match
        found: list[Node] = []
        for operand, _ in match.addends:
            term = self._term(operand, values)
            if isinstance(term, Mismatch):
                return term
            found += term
        return found

    def _term(self, node: Node, values: Container[Node]) -> list[Node] | Mismatch:
        node = through_transparent(node)
        if node in values:
            return [node]
        if is_product(node):
            factors = [self._term(n, values) for n in node.args if isinstance(n, Node) and is_float_tensor(n)]
            of_values = (factor for factor in factors if not isinstance(factor, Mismatch))
            return next(of_values, Mismatch("no factor is a value of a stream", node))
        return self.match(node, values)
