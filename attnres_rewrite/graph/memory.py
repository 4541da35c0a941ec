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
from attnres_rewrite.graph.nodes import FRESH, bodies_of, op_name, submodule_of, value_of

# Where a node keeps the names of what its kernel writes.
_WRITTEN = "attnres_written_by_kernel"
_IN_PLACE_OPERATORS = frozenset("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split())
# They return their argument itself where they drop nothing; on fake tensors they return another one.
_PASS_ON = frozenset("dropout alpha_dropout feature_dropout identity".split())


def overwritten_by(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors ``node`` changes in place."""
    if schemas := _compat.schemas_of(node.target):
        # Where Python is to choose one of several, it writes into what any of them would.
        written = (value for schema in schemas for argument, value in _arguments(node, schema) if is_written(argument))
        return tuple(dict.fromkeys(written))
    if _compat.is_triton_kernel(node.target):
        return _written_by_kernel(node)
    if isinstance(node.target, _compat.HigherOrderOperator):
        return _written_by_bodies(node)
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    out = node.kwargs.get("out")
    if out is not None:
        return tuple(_nodes_in(out))
    if not _is_in_place(node):
        return ()
    first = (*node.args[:1], *(node.kwargs[name] for name in ("input", "self") if name in node.kwargs))
    return tuple(_nodes_in(first[0])) if first else ()


def _written_by_kernel(node: Node) -> tuple[Node, ...]:
    """What the launch of a Triton kernel writes into; found once, as the kernel is compiled halfway to see it."""
    given: Any = node.kwargs["kwargs"]
    if _WRITTEN not in node.meta:
        values = {name: value_of(value) if isinstance(value, Node) else value for name, value in given.items()}
        node.meta[_WRITTEN] = _compat.written_by_kernel(**{**node.kwargs, "kwargs": values})
    return tuple(given[name] for name in node.meta[_WRITTEN] if isinstance(given[name], Node))


def _written_by_bodies(node: Node) -> tuple[Node, ...]:
    """What an operator that runs graphs writes into: the operands whose placeholders these write into."""
    bodies = bodies_of(node)
    if op_name(node) == "autograd_function_apply":
        # The second is the backward, whose placeholders are gradients.
        bodies = bodies[:1]
    operands = _compat.leaves(node.args)
    found: dict[Node, None] = {}
    for body in bodies:
        placeholders = list(body.graph.find_nodes(op="placeholder"))
        # The operands come last, in the order of the placeholders.
        given = dict(zip(reversed(placeholders), reversed(operands), strict=False))
        written = (target for inner in body.graph.nodes for target in overwritten_by(inner))
        memory = set[Node]().union(*map(aliases_of, written))
        found |= dict.fromkeys(n for p, n in given.items() if p in memory and isinstance(n, Node))
    return tuple(found)


def _nodes_in(given: Any) -> Iterator[Node]:
    """The nodes of an argument that is one or a list of some."""
    return (value for value in (given if isinstance(given, (tuple, list)) else [given]) if isinstance(value, Node))


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


def _arguments(node: Node, schema: Any) -> Iterator[tuple[Any, Node]]:
    """The arguments in the schema of an operator, with every node that is given for one."""
    for i, argument in enumerate(schema.arguments):
        by_position = i < len(node.args) and not argument.kwarg_only
        given = node.args[i] if by_position else node.kwargs.get(argument.name)
        yield from ((argument, value) for value in _nodes_in(given))


def is_written(argument: Any) -> bool:
    """Whether an operator writes into what it is given for this argument of its schema."""
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def may_share(result: Node, source: Node) -> bool:
    """Whether the result of an operator may share memory with one of its arguments."""
    if result.meta.get(FRESH):
        return False
    if op_name(result) in _PASS_ON or _storages(result) & _storages(source):
        return True
    for schema in _compat.schemas_of(result.target):
        returned = frozenset[str]().union(*map(_names, schema.returns))
        given = (argument for argument, value in _arguments(result, schema) if value is source)
        if any(not returned.isdisjoint(_names(argument)) for argument in given):
            return True
    return False


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
        for base in dict.fromkeys(map(representative, overwritten_by(node))):
            writers[base].append(node)
    shared = ((node, representative(node)) for node in graph.nodes)
    return {node: writers[base] for node, base in shared if base in writers}
