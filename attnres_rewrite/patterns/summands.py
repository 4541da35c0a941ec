"""What a value is a sum of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.fx import Node

from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_sum import LinearSum
from attnres_rewrite.patterns.stream_scale import ScaleMatch, StreamScale
from attnres_rewrite.patterns.transparent import through_transparent


def summands(node: Node, depends_on: Callable[..., bool], index: Mapping[Node, int]) -> frozenset[Node]:
    """``node``, and what it is a sum of, scaled or not.

    Args:
        node: The value.
        depends_on: Whether a node computes from one of some others; :meth:`.LinearValues.depends_on`.
        index: The topological order.
    """

    def is_own_gate(scale: ScaleMatch) -> bool:
        """Whether the factor computes from what it multiplies, as in a norm."""
        source, factor = through_transparent(scale.source), scale.factor
        if not isinstance(factor, Node) or index[factor] < index[source]:
            return False
        return depends_on(factor, lambda other: other is source, index[source])

    found, pending = set[Node](), [through_transparent(node)]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        scale, match = StreamScale().match(current), LinearSum().match(current)
        if not isinstance(scale, Mismatch) and not is_own_gate(scale):
            pending.append(through_transparent(scale.source))
        if not isinstance(match, Mismatch):
            pending += [through_transparent(operand) for operand, _ in match.addends]
    return frozenset(found)
