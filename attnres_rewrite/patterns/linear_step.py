"""A value that is a linear function of one other tensor."""

from __future__ import annotations

from torch.fx import Node

from attnres_rewrite.graph.nodes import require_tensor, same_shape
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_sum import LinearSum
from attnres_rewrite.patterns.stream_scale import StreamScale
from attnres_rewrite.patterns.transparent import through_transparent
from attnres_rewrite.streams import Addend, Step


def linear_step(node: Node) -> Step | None:
    """The scale, or the bias that is broadcast, by which ``node`` is a function of one other tensor."""
    scale = StreamScale().match(node)
    if not isinstance(scale, Mismatch):
        source = through_transparent(scale.source)
        if isinstance(scale.factor, Node):
            return Step(node, (Addend("value", source),), scale.factor, scale.divides)
        return Step(node, (Addend("value", source, scale.factor),))
    match = LinearSum().match(node)
    if isinstance(match, Mismatch):
        return None
    result = require_tensor(node)
    wide = [same_shape(require_tensor(operand), result) for operand, _ in match.addends]
    if wide[0] == wide[1]:
        return None
    (source, factor), (bias, weight) = match.addends if wide[0] else match.addends[::-1]
    return Step(node, (Addend("value", through_transparent(source), factor), Addend("bias", bias, weight)))
