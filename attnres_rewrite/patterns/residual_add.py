"""The add of a residual stream, in every spelling that tracers produce."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Node

from attnres_rewrite.graph import is_float_tensor, require_tensor, same_shape
from attnres_rewrite.patterns.base import Rejection

_ADD_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.iadd,
        torch.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add_.Tensor,
    }
)
_ADD_METHODS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


@dataclasses.dataclass(frozen=True)
class AddMatch:
    """The two operands of an add; ``right`` is multiplied by ``alpha``."""

    left: Node
    right: Node
    alpha: float


class ResidualAdd:
    """Two float tensors of one shape are added.

    ::

        x ──────┬─► norm ─► sublayer ─► f
                └──────────────────────►(+)─► x + alpha * f

    Which operand is the stream, and whether there is one, is data flow and not the pattern's business.
    """

    name = "residual add"

    def match(self, node: Node) -> AddMatch | Rejection:
        """The operands of the add ``node``."""
        if not is_add(node):
            return Rejection("not an add", node)
        named = [node.kwargs[key] for key in ("input", "other") if key in node.kwargs]
        left, right = [*node.args, *named, None][:2]
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not (isinstance(left, Node) and isinstance(right, Node)):
            return Rejection("one operand is a number", node)
        if not (is_float_tensor(left) and is_float_tensor(right)):
            return Rejection("an operand is not a float tensor", node)
        left_value, right_value = require_tensor(left), require_tensor(right)
        if not same_shape(left_value, right_value):
            return Rejection(
                f"the operands differ in shape: {list(left_value.shape)} and {list(right_value.shape)}", node
            )
        if not isinstance(alpha, (int, float)):
            return Rejection("alpha is not a number", node)
        return AddMatch(left, right, float(alpha))


def is_add(node: Node) -> bool:
    """Whether ``node`` adds, in whatever spelling."""
    if node.op == "call_function":
        return node.target in _ADD_FUNCTIONS
    return node.op == "call_method" and node.target in _ADD_METHODS
