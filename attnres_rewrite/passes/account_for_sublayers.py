"""Pass 4: no sublayer is left out of what is rewritten."""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_rewrite.extent import Extent
from attnres_rewrite.graph import (
    data_inputs,
    indices,
    is_float_tensor,
    module_path,
    module_stack,
    normalise_path,
    op_name,
    require_tensor,
    same_shape,
    source_line,
    submodule_of,
)
from attnres_rewrite.memory import overwritten_by
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.patterns.refusal import is_mixer
from attnres_rewrite.patterns.stream_scale import scaled_values
from attnres_rewrite.streams import Rejected

# What adds two tensors, with whatever factors; in place too, and as methods.
_SUMS = frozenset("add sub rsub radd iadd isub lerp addcmul addmm baddbmm".split())


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A sublayer that would stay plain.

    Attributes:
        node: Where it is in the graph.
        module: The module that it belongs to.
        reason: Why it is on no stream.
    """

    node: Node
    module: str
    reason: str

    @property
    def where(self) -> str:
        """The reason and the line of source code, for an error."""
        return f"{self.reason}; at {source_line(self.node)}"


class AccountForSublayers(Pass):
    """Find every sublayer that is on no stream and in no branch of one.

    Two nets. The first is data flow: an add ``x + f(x)``, where ``f`` multiplies by weights or mixes tokens, must be a
    step of a stream, or lie within a branch. The second is the module tree: where children of a list of
    layers have branches of a stream, every other child of their kind that ran must have some too. It finds what no add
    shows: an operator that adds and norms in one, a region that is compiled on its own.
    """

    def call(
        self, module: GraphModule, extents: Sequence[Extent], rejected: Sequence[Rejected]
    ) -> tuple[Leftover, ...]:
        """The sublayers of ``module``, which is not changed, that the streams with these extents leave out."""
        accounted = set[Node]().union(*(extent.accounted for extent in extents))
        reasons = {r.node: r.reason for r in rejected}
        left = [*_left_out_adds(module.graph, extents, reasons), *_hidden_adds(module, accounted)]
        return (*left, *_layers_without_branch(module.graph, accounted))

    def summary(self, result: tuple[Leftover, ...]) -> str:
        """Counts for the log."""
        return f"{len(result)} sublayers left out"


def _left_out_adds(graph: Graph, extents: Sequence[Extent], reasons: dict[Node, str]) -> Iterator[Leftover]:
    index = indices(graph)
    values = frozenset[Node]().union(*(extent.values for extent in extents))
    accounted = set[Node]().union(*(extent.accounted for extent in extents))
    states, live = set[Node](), _live(graph)
    for node in graph.nodes:
        if (
            node in accounted
            or node not in live
            or (base := added_to(node, index, values)) is None
            or _is_of_another_kind(node)
        ):
            continue
        if base in states or any(_is_state(base, extent) for extent in extents):
            states.add(node)
            continue
        reason = reasons.get(node, "it is no add of two tensors of one shape")
        yield Leftover(node, module_path(node), f"{reason}; {_origin(base)}")


def _is_state(base: Node, extent: Extent) -> bool:
    """Whether ``base`` is a value of a recurrence within a branch, whose last states are returned beside the stream."""
    return base in extent.inside or (base in extent.feeding and not list(data_inputs(base)))


def _origin(base: Node) -> str:
    """Where the value that a sublayer is added to comes from."""
    return f"what it adds to is the result of {op_name(base)} ({source_line(base)})"


def added_to(node: Node, index: dict[Node, int], values: Container[Node] = ()) -> Node | None:
    """The value ``x`` to which ``node`` adds a sublayer's ``f(x)``, if it does so.

    What lies behind one of ``values`` is accounted for: a long skip around a whole stream adds no sublayer of its own.
    """
    terms = _terms(node)
    for term in terms:
        bases = list(scaled_values(term))
        # Of an operator with several results, another one may be what the sublayer computes from.
        whole = {base.args[0] if op_name(base) == "getitem" else base for base in bases}
        known = {*bases, *(base for base in whole if isinstance(base, Node))}
        if any(other is not term and _mixes(other, known, index, values) for other in terms):
            return bases[-1]
    return None


def _is_of_another_kind(add: Node) -> bool:
    """Whether a lone add is no layer of a stream ``[..., T, D]``: of a pooled token, or of channels before a grid."""
    *outer, _ = require_tensor(add).shape
    one_token = len(outer) > 1 and all(statically_known_true(size == 1) for size in outer[1:])
    return one_token or (len(outer) > 2 and _is_convolved(add))


def _is_convolved(node: Node) -> bool:
    """Whether the first operators that make a sublayer, going back from ``node``, are all convolutions."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_mixer(current):
            if not _is_convolution(current):
                return False
            continue
        fresh = [source for source in data_inputs(current) if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return True


def _is_convolution(node: Node) -> bool:
    return op_name(node).startswith("conv") or isinstance(submodule_of(node), nn.modules.conv._ConvNd)


def _terms(node: Node) -> list[Node]:
    """The operands of a sum that have the shape of the result."""
    if node.op not in ("call_function", "call_method") or not is_float_tensor(node):
        return []
    if op_name(node).strip("_") not in _SUMS:
        return []
    result = require_tensor(node)
    named = [node.kwargs[key] for key in ("input", "other", "end", "tensor1", "tensor2") if key in node.kwargs]
    operands = [n for n in (*node.args, *named) if isinstance(n, Node) and is_float_tensor(n)]
    if op_name(node).strip("_") in ("addmm", "baddbmm"):
        # x + a @ b: the factors of the product have shapes of their own.
        first = operands[0] if operands else None
        return operands if first is not None and same_shape(require_tensor(first), result) else []
    return [n for n in operands if same_shape(require_tensor(n), result)]


def _mixes(node: Node, bases: Iterable[Node], index: dict[Node, int], values: Container[Node]) -> bool:
    """Whether ``node`` computes from one of ``bases`` through an operator that makes a sublayer, and no value."""
    targets = set(bases)
    earliest = min(index[base] for base in targets)
    mixed = {node: is_mixer(node)}
    pending = [(-index[node], node)]
    while pending:
        _, current = heapq.heappop(pending)
        if current in targets:
            if mixed[current]:
                return True
            continue
        for source in data_inputs(current) if current not in values else ():
            if index[source] < earliest:
                continue
            if source not in mixed:
                heapq.heappush(pending, (-index[source], source))
            mixed[source] = mixed.get(source, False) or mixed[current] or (source not in targets and is_mixer(source))
    return False


def _hidden_adds(module: GraphModule, accounted: Container[Node]) -> Iterator[Leftover]:
    """Adds of sublayers in the graphs that an operator of this one runs, such as a region compiled on its own."""
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or node in accounted:
            continue
        for body in _bodies(module, node):
            index = indices(body.graph)
            for inner in body.graph.nodes:
                if added_to(inner, index) is not None:
                    reason = f"it lies in the graph of a {op_name(node)}, which is not looked into"
                    yield Leftover(inner, module_path(node), reason)


def _bodies(module: GraphModule, node: Node) -> Iterator[GraphModule]:
    for source in node.all_input_nodes:
        body = getattr(module, str(source.target), None) if source.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield body


def _layers_without_branch(graph: Graph, accounted: Container[Node]) -> Iterator[Leftover]:
    """Children of a list of layers that ran and have no branch of a stream, while others like them have."""
    layers: dict[str, _Layer] = {}
    live = _live(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or node not in live:
            continue
        stack = module_stack(node)
        for depth, path in enumerate(stack):
            if path.rpartition(".")[2].isdigit():
                layer = layers.setdefault(path, _Layer(node, path, _kind(node, path)))
                layer.parts.update(inner.removeprefix(path) for inner in stack[depth + 1 :])
                layer.has_branch = layer.has_branch or node in accounted
                layer.mixers.update([_is_convolution(node)] if is_mixer(node) else [])
                layer.is_opaque = layer.is_opaque or _is_foreign(node)
    lists = collections.defaultdict(list)
    for path, layer in layers.items():
        lists[path.rpartition(".")[0]].append(layer)
    for children in lists.values():
        found = [layer for layer in children if layer.has_branch]
        for layer in children:
            if not layer.has_branch and any(layer.is_like(other) for other in found):
                reason = f"module {layer.path!r} ran without an add on a stream, as there is in {found[0].path!r}"
                yield Leftover(layer.first, layer.path, reason)


@dataclasses.dataclass(eq=False)
class _Layer:
    """A module in a list: its first node, the modules in it that ran, and whether what mixes in it is a convolution."""

    first: Node
    path: str
    kind: object
    parts: set[str] = dataclasses.field(default_factory=set)
    has_branch: bool = False
    mixers: set[bool] = dataclasses.field(default_factory=set)
    is_opaque: bool = False

    def is_like(self, other: _Layer) -> bool:
        """Whether this is a layer of the same kind, by its class or the better part of its modules, or a hidden one."""
        if not other.parts or self.mixers == {True}:
            return False
        mine, theirs = self.kind, other.kind
        if self.is_opaque or mine == theirs:
            return True
        # An exported program names classes, Dynamo has them.
        if (
            isinstance(mine, type)
            and isinstance(theirs, type)
            and (issubclass(mine, theirs) or issubclass(theirs, mine))
        ):
            return True
        return 2 * len(self.parts & other.parts) >= len(self.parts | other.parts)


def _is_foreign(node: Node) -> bool:
    """Whether ``node`` calls an operator that PyTorch does not know the inside of."""
    name = getattr(node.target, "_qualified_op_name", getattr(node.target, "_name", ""))
    return isinstance(name, str) and "::" in name and name.partition("::")[0] not in ("aten", "prims", "attnres")


def _live(graph: Graph) -> set[Node]:
    """The nodes that an output computes from, or what is written in place."""
    live = {node for node in graph.nodes if node.op == "output" or overwritten_by(node) is not None}
    pending = list(live)
    while pending:
        fresh = [source for source in pending.pop().all_input_nodes if source not in live]
        live.update(fresh)
        pending.extend(fresh)
    return live


def _kind(node: Node, path: str) -> object:
    stack = node.meta.get("nn_module_stack") or {}
    return next((kind for inner, kind in stack.values() if normalise_path(inner) == path), None)
