"""Operations that a residual stream passes through unchanged."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_rewrite.graph import is_float_tensor, op_name, require_tensor, same_shape
from attnres_rewrite.patterns.base import Rejection

_CASTS = frozenset("to float double half bfloat16 type_as _to_copy convert_element_type".split())
_COPIES = frozenset("contiguous alias clone lift_fresh_copy identity".split())
_VIEWS = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze unsqueeze".split())


class Transparent:
    """The same numbers under another dtype, memory format or shape with the same last dimension.

    ::

        x ─► to / contiguous / clone / view ─► the same stream value

    OPT reshapes its stream to ``[B * T, D]`` and back; Llama's norm casts it, and an exported graph
    then adds to the cast. ``detach`` is not among them: it stops gradients.
    """

    name = "transparent operation"

    def match(self, node: Node) -> Node | Rejection:
        """The node whose value ``node`` passes on."""
        name = op_name(node) if node.op in ("call_function", "call_method") else ""
        if name not in _CASTS | _COPIES | _VIEWS:
            return Rejection("not a transparent operation", node)
        source = node.args[0] if node.args else None
        if not (isinstance(source, Node) and is_float_tensor(source) and is_float_tensor(node)):
            return Rejection("not a float tensor in and out", node)
        before, after = require_tensor(source), require_tensor(node)
        if name not in _VIEWS and not same_shape(before, after):
            return Rejection("the shape changes", node)
        if not statically_known_true(before.shape[-1] == after.shape[-1]):
            return Rejection("the last dimension changes", node)
        return source


def through_transparent(node: Node) -> Node:
    """The first node of the chain of transparent operations that ends in ``node``."""
    while isinstance(source := _TRANSPARENT.match(node), Node):
        node = source
    return node


_TRANSPARENT = Transparent()
