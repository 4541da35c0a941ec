"""Operations that a residual stream passes through unchanged."""

from __future__ import annotations

from collections.abc import Container

from torch import nn
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_rewrite.graph.nodes import (
    SHAPE_ONLY,
    carries_data,
    is_float_tensor,
    op_name,
    require_tensor,
    same_shape,
    submodule_of,
)
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_sum import is_add

_CASTS = frozenset("to float double half bfloat16 type_as _to_copy convert_element_type".split())
_COPIES = frozenset("contiguous alias clone lift_fresh_copy identity".split())
_VIEWS = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze unsqueeze".split())


class Transparent:
    """The same numbers under another dtype, memory format or shape with the same last dimension.

    ::

        x ─► to / contiguous / clone / view / 0 + x / inactive dropout ─► the same stream value

    OPT reshapes its stream to ``[B * T, D]`` and back; Llama's norm casts it, and an exported graph
    then adds to the cast. ``detach`` is not among them: it stops gradients.
    """

    name = "transparent operation"

    def match(self, node: Node) -> Node | Mismatch:
        """The node whose value ``node`` passes on."""
        source = _unchanged(node) or _copied_or_viewed(node)
        if source is None:
            return Mismatch("not a transparent operation", node)
        if not (is_float_tensor(source) and is_float_tensor(node)):
            return Mismatch("not a float tensor in and out", node)
        before, after = require_tensor(source), require_tensor(node)
        if not _is_view(node) and not same_shape(before, after):
            return Mismatch("the shape changes", node)
        if not statically_known_true(before.shape[-1] == after.shape[-1]):
            return Mismatch("the last dimension changes", node)
        return source


def _is_view(node: Node) -> bool:
    return op_name(node) in _VIEWS or op_name(node) == "getitem"


def _copied_or_viewed(node: Node) -> Node | None:
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if name == "getitem":
        # x[None], x[:, None]: a view that leaves nothing out.
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return source if all(part in (None, ..., slice(None)) for part in index) else None
    return source if name in _CASTS | _COPIES | _VIEWS else None


def _unchanged(node: Node) -> Node | None:
    """What an operation that does nothing here is applied to: zero added, a dropout that drops nothing."""
    module = submodule_of(node)
    # A graph that calls modules may be trained later: a dropout that is off for now is not nothing.
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.p):
        return node.args[0] if isinstance(node.args[0], Node) else None
    if is_add(node) and len(node.args) == 2 and not node.kwargs and 0 in node.args:
        return next((operand for operand in node.args if isinstance(operand, Node)), None)
    if node.op == "call_function" and op_name(node) == "dropout" and node.args:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return node.args[0] if not (p and training) and isinstance(node.args[0], Node) else None
    return None


def through_transparent(node: Node) -> Node:
    """The first node of the chain of transparent operations that ends in ``node``."""
    while isinstance(source := _TRANSPARENT.match(node), Node):
        node = source
    return node


def reads_of(value: Node, on_stream: Container[Node] = ()) -> list[Node]:
    """The nodes that read the stream value, directly or behind transparent operations, but for those on the stream."""
    reads, pending, seen = [], [value], {value}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or user in on_stream:
                continue
            seen.add(user)
            if isinstance(_TRANSPARENT.match(user), Node):
                pending.append(user)
            elif carries_data(user) and op_name(user) not in SHAPE_ONLY:
                reads.append(user)
    return reads


_TRANSPARENT = Transparent()
