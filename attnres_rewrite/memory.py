"""Which nodes share memory, and which overwrite it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from attnres_rewrite.graph import op_name

# Operators whose result may share memory with their first argument: views, and those that can return it as it is.
ALIASING = frozenset(
    (
        "view reshape view_as reshape_as alias squeeze unsqueeze flatten unflatten getitem select slice transpose "
        "permute t mT T swapaxes movedim chunk split unbind expand expand_as narrow detach as_strided diagonal real "
        "contiguous to float double half bfloat16 type_as dropout identity"
    ).split()
)
_IN_PLACE_OPERATORS = frozenset("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split())


def overwritten_by(node: Node) -> Node | None:
    """The node whose tensor ``node`` changes in place, if it does so."""
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    target, name = node.target, op_name(node)
    if isinstance(target, torch._ops.OpOverload):
        for argument, value in zip(target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                return value
        return None
    if node.op == "call_method":
        return first if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) else None
    if node.op != "call_function":
        return None
    if getattr(operator, name, None) is target:
        return first if name == "setitem" or name in _IN_PLACE_OPERATORS else None
    return first if node.kwargs.get("inplace") or name.endswith("_") else None


def memory_base(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of."""
    while op_name(node) in ALIASING and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def aliases_of(node: Node) -> set[Node]:
    """The nodes that may be views of the same memory as ``node``, itself among them."""
    base = memory_base(node)
    found, pending = {base}, [base]
    while pending:
        for user in pending.pop().users:
            if op_name(user) in ALIASING and user not in found and user.args and user.args[0] in found:
                found.add(user)
                pending.append(user)
    return found
