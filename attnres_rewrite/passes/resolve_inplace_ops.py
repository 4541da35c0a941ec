"""Pass 2: operations in place become ordinary ones."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.memory import aliases_of, in_place_argument, is_written, overwritten_by
from attnres_rewrite.graph.nodes import (
    FRESH,
    GraphBuilder,
    indices,
    is_float_tensor,
    op_name,
    require_tensor,
    same_shape,
    submodule_of,
    tensor_of,
)
from attnres_rewrite.passes.base import Pass, require_order


class ResolveInplaceOps(Pass):
    """Make ``x += f`` the ordinary ``x' = x + f``, with later uses of ``x`` reading ``x'``; ``relu_(x)`` likewise.

    ::

        x ─► iadd(x, f)         x ─► add(x, f) = x'
        later: use(x)           later: use(x')

    In the graph such an operation leaves two names for one tensor; after this pass a value has one name,
    and data flow is what the edges say. One on a tensor that came from outside, or that is used
    later under another name (a view, or a cast that changed nothing), is left alone.
    """

    def call(self, module: GraphModule) -> int:
        """Rewrite all in-place operations that overwrite an intermediate; returns how many."""
        count = 0
        index, build = indices(module.graph), GraphBuilder(module)
        for node in list(module.graph.nodes):
            overwritten = _overwritten(node)
            if overwritten is None or _is_shared(overwritten, node, index):
                continue
            if not _set_out_of_place(module, node):
                continue
            node.meta[FRESH] = True
            result = _in_dtype_of(overwritten, node, build)
            for user in list(overwritten.users):
                if index.get(user, 0) > index[node]:
                    user.replace_input_with(overwritten, result)
            count += 1
        if count:
            module.recompile()
        return count

    def ensures(self, module: GraphModule, result: int) -> None:
        """The graph is still in topological order."""
        require_order(module)


def _overwritten(node: Node) -> Node | None:
    """What ``node`` overwrites as a whole, and returns."""
    written = overwritten_by(node)
    if len(written) != 1 or not (is_float_tensor(written[0]) and is_float_tensor(node)):
        return None
    (target,) = written
    return target if same_shape(require_tensor(target), require_tensor(node)) else None


def _is_shared(value: Node, write: Node, index: dict[Node, int]) -> bool:
    """Whether something that may share memory with ``value`` is used after ``write``, under a name of its own."""
    for alias in aliases_of(value, lambda other: index.get(other, 0) < index[write]):
        if alias.op in ("placeholder", "get_attr"):
            return True
        if alias is not value and any(user is not write and index[user] > index[write] for user in alias.users):
            return True
    return False


def _set_out_of_place(module: GraphModule, node: Node) -> bool:
    """Make ``node`` an ordinary operation with the same arguments, if there is one."""
    if node.op == "call_module":
        return _copy_module(module, node)
    if isinstance(node.target, _compat.Overload):
        return _set_overload(node)
    if "out" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        return True
    if (bound := in_place_argument(node)) is not None:
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
        return True
    name = op_name(node)
    if node.op == "call_method":
        plain = name.strip("_").removeprefix("i") if name.startswith("__i") else name.removesuffix("_")
        found: Any = plain if callable(getattr(torch.Tensor, plain, None)) else None
    else:
        found = _out_of_place_function(node.target, name)
    if found is None:
        return False
    node.target = found
    return True


def _out_of_place_function(target: object, name: str) -> Callable[..., Any] | None:
    """``operator.add`` for ``operator.iadd``, ``torch.relu`` for ``torch.relu_``."""
    if getattr(operator, name, None) is target:
        return getattr(operator, name.removeprefix("i"), None)
    found = getattr(torch, name.removesuffix("_"), None) or getattr(torch.nn.functional, name.removesuffix("_"), None)
    return found if callable(found) else None


def _set_overload(node: Node) -> bool:
    """The overload with the same arguments of the operator without the underscore, or without ``out``."""
    target = node.target
    assert isinstance(target, _compat.Overload)
    namespace, name = getattr(torch.ops, target.namespace), op_name(node)
    packet = getattr(namespace, name.removesuffix("_"), None)
    arguments = _compat.schema_of(target).arguments
    outs = [argument.name for argument in arguments if argument.is_out]
    wanted = [str(argument.type) for argument in arguments if not argument.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        taken = _compat.schema_of(found).arguments
        if [str(argument.type) for argument in taken] == wanted and not any(map(is_written, taken)):
            node.target = found
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in outs}
            return True
    return False


def _copy_module(module: GraphModule, node: Node) -> bool:
    """Call a copy of the module, which works out of place; the module itself may be the user's."""
    plain: Any = copy.copy(submodule_of(node))
    plain.inplace = False
    path = f"{node.target}_out_of_place"
    module.add_submodule(path, plain)
    node.target = path
    return True


def _in_dtype_of(overwritten: Node, node: Node, build: GraphBuilder) -> Node:
    """The node of the result of ``node`` in the dtype of ``overwritten``.

    In place, the dtype of what is overwritten stays; an ordinary operation promotes.
    """
    dtypes = [value.dtype for n in node.all_input_nodes if (value := tensor_of(n)) is not None and value.dim() > 0]
    wide, dtype = require_tensor(overwritten).dtype, require_tensor(overwritten).dtype
    for other in dtypes:
        wide = torch.promote_types(wide, other)
    if wide == dtype:
        return node
    with build.graph.inserting_after(node):
        users = list(node.users)
        build.retype(node, wide)
        cast = build.call(torch.ops.aten.to.dtype, node, dtype, like=node)
    for user in users:
        user.replace_input_with(node, cast)
    return cast
