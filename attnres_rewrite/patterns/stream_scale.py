"""A stream that is itself scaled between its adds."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch.fx import Node

from attnres_rewrite.graph.nodes import is_float_tensor, op_name, require_tensor, same_shape, tensor_of
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.transparent import through_transparent

aten = torch.ops.aten

_MULTIPLICATIONS = frozenset(
    {operator.mul, operator.imul, torch.mul, torch.multiply}
    | {aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar}
    | {"mul", "multiply", "__mul__", "__rmul__"}
)
_DIVISIONS = frozenset(
    {operator.truediv, torch.div, torch.divide, torch.true_divide}
    | {aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.divide.Scalar}
    | {aten.true_divide.Tensor, aten.true_divide.Scalar}
    | {"div", "divide", "true_divide", "__truediv__"}
)
_NEGATIONS = frozenset(
    {operator.neg, torch.neg, torch.negative, aten.neg.default, aten.negative.default} | {"neg", "negative", "__neg__"}
)


@dataclasses.dataclass(frozen=True)
class ScaleMatch:
    """The scaled tensor, and the factor: a number, a tensor, or a tensor that it is divided by."""

    source: Node
    factor: Node | float
    divides: bool = False


class StreamScale:
    """Multiplication or division by a number, a parameter, or anything else that is not the stream; negation.

    ::

        x ─► (* c) ─► the stream goes on, scaled

    Elementwise scaling is linear, so it distributes over the sources. That the factor does not depend
    on the stream (a gate) is for the caller to check, who knows the stream.
    """

    name = "stream scale"

    def match(self, node: Node) -> ScaleMatch | Mismatch:
        """The operands of the scaling ``node``, the one with the node's own shape first."""
        if node.op not in ("call_function", "call_method") or node.kwargs or not is_float_tensor(node):
            return Mismatch("not a plain operation of float tensors", node)
        if node.target in _NEGATIONS:
            return ScaleMatch(node.args[0], -1.0) if is_float_tensor(node.args[0]) else Mismatch("no float", node)  # type: ignore[arg-type]
        divides = node.target in _DIVISIONS
        if not (divides or node.target in _MULTIPLICATIONS) or len(node.args) != 2:
            return Mismatch("not a multiplication, division or negation", node)
        left, right = node.args
        for source, factor in ((left, right),) if divides else ((left, right), (right, left)):
            if isinstance(source, Node) and is_float_tensor(source) and _is_factor(factor, divides):
                before, after = require_tensor(source), require_tensor(node)
                if same_shape(before, after) and not _as_wide(factor, after):
                    return _scaled_by(source, factor, divides)
        return Mismatch("no operand has the shape of the result", node)


def _is_factor(factor: object, divides: bool) -> TypeGuard[Node | float]:
    if isinstance(factor, (int, float)):
        return bool(factor) or not divides
    return tensor_of(factor) is not None


def _scaled_by(source: Node, factor: Node | float, divides: bool) -> ScaleMatch:
    if isinstance(factor, Node):
        return ScaleMatch(source, factor, divides)
    return ScaleMatch(source, 1.0 / factor if divides else float(factor))


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies or divides, in whatever spelling."""
    return node.op in ("call_function", "call_method") and node.target in _MULTIPLICATIONS | _DIVISIONS


def scaled_values(node: Node) -> Iterator[Node]:
    """``node`` without transparent operations, and what it is without one scale after another."""
    yield (node := through_transparent(node))
    while isinstance(match := StreamScale().match(node), ScaleMatch):
        yield (node := through_transparent(match.source))


def linear_source(node: Node) -> Node:
    """What ``node`` is by nothing but scales, copies and a stop of gradients."""
    while True:
        *_, node = scaled_values(node)
        if op_name(node) != "detach" or not isinstance(node.args[0], Node):
            return node
        node = node.args[0]


def _as_wide(factor: object, result: torch.Tensor) -> bool:
    """Whether the factor differs from token to token, as a gate does."""
    value = tensor_of(factor)
    return value is not None and same_shape(value, result) and result.dim() > 1
