"""Pass 2: in-place adds and scales become out-of-place ones."""

from __future__ import annotations

import functools
import operator

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.graph import GraphBuilder, indices, is_float_tensor, op_name, require_tensor, same_shape
from attnres_rewrite.memory import ALIASING, memory_base
from attnres_rewrite.passes.base import Pass, PostconditionError

_OUT_OF_PLACE: dict[object, object] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.ops.aten.add_.Tensor: torch.ops.aten.add.Tensor,
    torch.ops.aten.mul_.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.mul_.Scalar: torch.ops.aten.mul.Scalar,
    torch.ops.aten.div_.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.div_.Scalar: torch.ops.aten.div.Scalar,
    "add_": "add",
    "__iadd__": "add",
    "mul_": "mul",
    "__imul__": "mul",
    "div_": "div",
    "__itruediv__": "div",
}


class ResolveInplaceOps(Pass):
    """Make ``x += f`` the ordinary ``x' = x + f``, with later uses of ``x`` reading ``x'``; ``x *= c`` likewise.

    ::

        x ─► iadd(x, f)         x ─► add(x, f) = x'
        later: use(x)           later: use(x')

    In the graph such an operation leaves two names for one tensor; after this pass a value has one name,
    and data flow is what the edges say. One on a tensor that came from outside, or that is used
    later under another name (a view, or a cast that changed nothing), is left alone.
    """

    def call(self, module: GraphModule) -> int:
        """Rewrite all in-place adds and scales that overwrite an intermediate; returns how many."""
        count = 0
        index = indices(module.graph)
        for node in list(module.graph.nodes):
            overwritten = _overwritten(node)
            if overwritten is None or _is_shared(overwritten, node, index):
                continue
            result = _set_out_of_place(module, node, overwritten)
            for user in list(overwritten.users):
                if index.get(user, 0) > index[node]:
                    user.replace_input_with(overwritten, result)
            count += 1
        if count:
            module.recompile()
        return count

    def ensures(self, module: GraphModule, result: int) -> None:
        """The graph is still in topological order."""
        try:
            module.graph.lint()
        except RuntimeError as error:
            raise PostconditionError(str(error)) from error


def _overwritten(node: Node) -> Node | None:
    """What ``node`` adds to or scales in place."""
    if node.op not in ("call_function", "call_method") or node.target not in _OUT_OF_PLACE:
        return None
    if not all(is_float_tensor(operand) for operand in node.all_input_nodes) or not node.args:
        return None
    target = node.args[0]
    return target if isinstance(target, Node) and same_shape(require_tensor(target), require_tensor(node)) else None


def _is_shared(value: Node, add: Node, index: dict[Node, int]) -> bool:
    """Whether something that may share memory with ``value`` is used after ``add``, under a name of its own."""
    base = memory_base(value)
    if base.op in ("placeholder", "get_attr"):
        return True
    pending, seen = [base], {base}
    while pending:
        alias = pending.pop()
        for user in alias.users:
            if alias is not value and user is not add and index[user] > index[add]:
                return True
            if user is not add and op_name(user) in ALIASING and user not in seen and index[user] < index[add]:
                seen.add(user)
                pending.append(user)
    return False


def _set_out_of_place(module: GraphModule, node: Node, overwritten: Node) -> Node:
    """Make ``node`` an ordinary operation; returns the node of its result in the dtype of ``overwritten``."""
    node.target = _OUT_OF_PLACE[node.target]  # type: ignore[assignment]
    dtypes = [require_tensor(operand).dtype for operand in node.all_input_nodes]
    wide, dtype = functools.reduce(torch.promote_types, dtypes), require_tensor(overwritten).dtype
    if wide == dtype:
        return node
    # In place, the dtype of what is overwritten stays; an ordinary operation promotes.
    with module.graph.inserting_after(node):
        build = GraphBuilder(module)
        users = list(node.users)
        build.retype(node, wide)
        cast = build.call(torch.ops.aten.to.dtype, node, dtype, like=node)
    for user in users:
        user.replace_input_with(node, cast)
    return cast
