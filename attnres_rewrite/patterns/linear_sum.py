"""A sum of tensors, each times a number, in every spelling that tracers produce."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Node

from attnres_rewrite.graph.nodes import is_float_tensor
from attnres_rewrite.patterns.base import Mismatch

aten = torch.ops.aten

_ADDS = frozenset(
    {operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor}
    | {"add", "add_", "__add__", "__radd__", "__iadd__"}
)
_SUBTRACTIONS = frozenset(
    {operator.sub, operator.isub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub_.Tensor, aten.subtract.Tensor}
    | {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
)
_REVERSED = frozenset({torch.rsub, aten.rsub.Tensor, "__rsub__"})
_INTERPOLATIONS = frozenset({torch.lerp, aten.lerp.Scalar, aten.lerp_.Scalar, "lerp", "lerp_"})
_SUMS = _ADDS | _SUBTRACTIONS | _REVERSED | _INTERPOLATIONS


@dataclasses.dataclass(frozen=True)
class SumMatch:
    """The operands of a sum, each with the number that it is multiplied by."""

    addends: tuple[tuple[Node, float], ...]


class LinearSum:
    """Float tensors are added, subtracted, or interpolated by a number.

    ::

        a ─► (* m) ─┐
        b ─► (* n) ─┴─► (+) ─► m * a + n * b

    Which operands are values of a stream, and which are what a branch adds to it, is data flow and not the
    pattern's business.
    """

    name = "sum"

    def match(self, node: Node) -> SumMatch | Mismatch:
        """The operands of the sum ``node``."""
        if not is_sum(node):
            return Mismatch("not a sum", node)
        named = [node.kwargs[key] for key in ("input", "other", "end", "weight") if key in node.kwargs]
        left, right, third = [*node.args, *named, None, None][:3]
        if not (isinstance(left, Node) and isinstance(right, Node)):
            return Mismatch("one operand is a number", node)
        if not (is_float_tensor(left) and is_float_tensor(right) and is_float_tensor(node)):
            return Mismatch("an operand is not a float tensor", node)
        is_weighted = node.target in _INTERPOLATIONS
        number = third if is_weighted else node.kwargs.get("alpha", 1 if third is None else third)
        if not isinstance(number, (int, float)):
            return Mismatch("the weight is not a number" if is_weighted else "alpha is not a number", node)
        number = float(number)
        if is_weighted:
            return SumMatch(((left, 1.0 - number), (right, number)))
        if node.target in _ADDS:
            return SumMatch(((left, 1.0), (right, number)))
        return SumMatch(
            ((left, 1.0), (right, -number)) if node.target in _SUBTRACTIONS else ((left, -number), (right, 1.0))
        )


def is_sum(node: Node) -> bool:
    """Whether ``node`` adds, subtracts or interpolates, in whatever spelling."""
    return node.op in ("call_function", "call_method") and node.target in _SUMS


def is_add(node: Node) -> bool:
    """Whether ``node`` adds, in whatever spelling."""
    return node.op in ("call_function", "call_method") and node.target in _ADDS
