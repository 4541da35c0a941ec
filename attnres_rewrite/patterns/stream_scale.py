"""A stream that is itself scaled between its adds."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from attnres_rewrite.graph import is_float_tensor, require_tensor, same_shape, tensor_of
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.transparent import through_transparent

_MUL = frozenset({operator.mul, operator.imul, torch.mul, torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar})
_DIV = frozenset({operator.truediv, torch.div, torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar})


@dataclasses.dataclass(frozen=True)
class ScaleMatch:
    """The scaled tensor, and the factor or divisor."""

    source: Node
    factor: Node | float


class StreamScale:
    """Multiplication or division by a number, a parameter, or anything else that is not the stream.

    ::

        x ─► (* c) ─► the stream goes on, scaled

    Elementwise scaling is linear, so it distributes over the sources. That the factor does not depend
    on the stream (a gate) is for the caller to check, who knows the stream.
    """

    name = "stream scale"

    def match(self, node: Node) -> ScaleMatch | Rejection:
        """The operands of the scaling ``node``, the one with the node's own shape first."""
        multiplies = node.target in _MUL or node.target in ("mul", "__mul__", "__rmul__")
        divides = node.target in _DIV or node.target in ("div", "__truediv__")
        if node.op not in ("call_function", "call_method") or not (multiplies or divides):
            return Rejection("not a multiplication or division", node)
        if len(node.args) != 2 or node.kwargs or not is_float_tensor(node):
            return Rejection("not a plain multiplication of float tensors", node)
        left, right = node.args
        for source, factor in ((left, right), (right, left)) if multiplies else ((left, right),):
            if not (isinstance(source, Node) and is_float_tensor(source)):
                continue
            if not isinstance(factor, (int, float, Node)):
                continue
            if isinstance(factor, Node) and tensor_of(factor) is None:
                continue
            before, after = require_tensor(source), require_tensor(node)
            if same_shape(before, after) and not _as_wide(factor, after):
                return ScaleMatch(source, factor)
        return Rejection("no operand has the shape of the result", node)


def scaled_values(node: Node) -> Iterator[Node]:
    """``node`` without transparent operations, and what it is without one scale after another."""
    yield (node := through_transparent(node))
    while isinstance(match := StreamScale().match(node), ScaleMatch):
        yield (node := through_transparent(match.source))


def _as_wide(factor: object, result: torch.Tensor) -> bool:
    """Whether the factor differs from token to token, as a gate does."""
    value = tensor_of(factor)
    return value is not None and same_shape(value, result) and result.dim() > 1
