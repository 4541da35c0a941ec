"""Which nodes share memory, and which overwrite it.

Tracers run every operator on fake tensors, which have storages as real ones have. Two nodes share memory where their
values share a storage, whatever the operators are called. Schemas say the same of a program that was saved and loaded,
where every value got a storage of its own.
"""

from __future__ import annotations

import collections
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Graph, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import FRESH, op_name, submodule_of, value_of

_IN_PLACE_OPERATORS = frozenset("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split())
# They return their argument itself where they drop nothing; on fake tensors they return another one.
_PASS_ON = frozenset("dropout alpha_dropout feature_dropout identity".split())


def overwritten_by(node: Node) -> Node | None:
    """The node whose tensor ``node`` changes in place, if it does so."""
    if isinstance(node.target, _compat.Overload):
        return next((value for argument, value in _arguments(node) if _writes(argument)), None)
    if node.op not in ("call_function", "call_method", "call_module"):
        return None
    out = node.kwargs.get("out")
    if out is not None:
        return next((n for n in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(n, Node)), None)
    first = next((n for n in (*node.args[:1], node.kwargs.get("input")) if isinstance(n, Node)), None)
    return first if _is_in_place(node) else None


def _is_in_place(node: Node) -> bool:
    """Whether an operator that has no schema changes its first argument."""
    target, name = node.target, op_name(node)
    if node.op == "call_module":
        return bool(getattr(submodule_of(node), "inplace", False))
    if node.op == "call_method":
        return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if getattr(operator, name, None) is target:
        return name == "setitem" or name in _IN_PLACE_OPERATORS
    return (name.endswith("_") and not name.endswith("__")) or bool(in_place_argument(node))


def in_place_argument(node: Node) -> inspect.BoundArguments | None:
    """The arguments of a function that is asked by one of them, by position or by name, to work in place."""
    signature = _signature(node.target)
    if signature is None or "inplace" not in signature.parameters:
        return None
    bound = signature.bind(*node.args, **node.kwargs)
    return bound if bound.arguments.get("inplace") else None


@functools.cache
def _signature(target: object) -> inspect.Signature | None:
    """The signature of a function in Python; operators have schemas instead."""
    return inspect.signature(target) if inspect.isfunction(target) else None


def _arguments(node: Node) -> Iterator[tuple[Any, Node]]:
    """The arguments in the schema of an operator, with every node that is given for one."""
    assert isinstance(node.target, _compat.Overload)
    for i, argument in enumerate(_compat.schema_of(node.target).arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for value in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(value, Node):
                yield argument, value


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def may_share(result: Node, source: Node) -> bool:
    """Whether the result of an operator may share memory with one of its arguments."""
    if result.meta.get(FRESH):
        return False
    if op_name(result) in _PASS_ON or _storages(result) & _storages(source):
        return True
    if not isinstance(result.target, _compat.Overload):
        return False
    returned = {
        name for r in _compat.schema_of(result.target).returns if r.alias_info is not None for name in _names(r)
    }
    return any(value is source and not returned.isdisjoint(_names(argument)) for argument, value in _arguments(result))


def _names(argument: Any) -> frozenset[str]:
    """The alias sets of an argument or a result in a schema."""
    return frozenset() if argument.alias_info is None else frozenset(argument.alias_info.before_set)


def _storages(node: Node) -> set[int]:
    """The storages of all tensors in the value of ``node``."""
    return {s for tensor in _compat.tensors_in(value_of(node)) if (s := _compat.storage_of(tensor)) is not None}


def aliases_of(node: Node, until: Callable[[Node], bool] = lambda _: True) -> set[Node]:
    """The nodes that may share memory with ``node``, itself among them; of those for which ``until`` holds."""
    found, pending = {node}, [node]
    while pending:
        current = pending.pop()
        sources = (source for source in current.all_input_nodes if may_share(current, source))
        results = (user for user in current.users if may_share(user, current))
        fresh = {other for other in (*sources, *results) if other not in found and until(other)}
        found |= fresh
        pending += fresh
    return found


def writers_of(graph: Graph) -> dict[Node, list[Node]]:
    """For every node whose memory something overwrites: the nodes that do."""
    first: dict[Node, Node] = {}

    def representative(node: Node) -> Node:
        while (parent := first.get(node, node)) is not node:
            first[node] = first.get(parent, parent)
            node = parent
        return node

    for node in graph.nodes:
        for source in node.all_input_nodes:
            if may_share(node, source):
                first[representative(node)] = representative(source)
    writers: dict[Node, list[Node]] = collections.defaultdict(list)
    for node in graph.nodes:
        if (overwritten := overwritten_by(node)) is not None:
            writers[representative(overwritten)].append(node)
    shared = ((node, representative(node)) for node in graph.nodes)
    return {node: writers[base] for node, base in shared if base in writers}
