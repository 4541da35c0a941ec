"""A model that attends over depth already."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_rewrite.graph.extent import Extent
from attnres_rewrite.graph.nodes import data_inputs, indices, is_float_tensor, op_name, require_tensor
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.operators import is_mixer
from attnres_rewrite.patterns.transparent import through_transparent

ATTENDS_OVER_DEPTH = (
    "attention over depth: the model attends over depth already. Values of its residual stream from different depths "
    "meet here with weights that are computed from them, before a sublayer reads the result, so Attention Residuals "
    "would do over again what this does"
)

_JOINS = frozenset("stack cat concat concatenate hstack vstack dstack column_stack".split())
# These put a value into a part of what is there.
_WRITES = frozenset("select_scatter slice_scatter index_put index_copy".split())
_PRODUCTS = frozenset("einsum matmul bmm baddbmm mm".split())
_ATTENTION = frozenset("scaled_dot_product_attention".split())
_SUMS = frozenset("add sub radd rsub iadd isub".split())
# What makes weights, and not values, of its argument, or one number of many.
_FORGETS = frozenset("softmax log_softmax sigmoid tanh sum mean amax amin norm var std argmax topk sort cumsum".split())
# Weights go through one of these; the reciprocal root of a norm does not.
_GATES = frozenset(
    "softmax sigmoid tanh exp relu gelu silu softplus hardtanh clamp scaled_dot_product_attention".split()
)


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a node holds of values from different depths, unmixed: through norms, scales and views at most.

    Attributes:
        values: Two of them at most; more tell nothing more.
        joins: Where they were put side by side, and how many there are if that is known.
        weighted: Whether they are multiplied by weights that compute from them.
    """

    values: tuple[Node, ...] = ()
    joins: tuple[tuple[Node, int | None], ...] = ()
    weighted: bool = False

    @property
    def several(self) -> bool:
        return len(self.values) > 1


_NOTHING = _Held()


class DepthAttention:
    """Values of different depths are summed with weights that compute from them, and a sublayer reads the sum.

    ::

        x_1 ─┐
        x_2 ─┼─► stack ─┬─► norm ─► logits ─► softmax ─► weights
        x_k ─┘          └─────────────────────────────────(*)──► sum ─► norm ─► sublayer ─► x_{k+1}

    The values are those of one stream, those of several that belong together (the partial sums of blocks), or branch
    outputs, of which each is its own block. What makes the sum is ``einsum``, ``matmul``, attention, or a product and a
    sum. Weights that do not compute from the values make a linear map, and are no attention. Neither is a sum that is
    read after the last layer alone.
    """

    name = "attention over depth"

    def match(self, graph: Graph, extents: Sequence[Extent]) -> Node | Mismatch:
        """Where values first meet their weights, if anywhere on the way to a sublayer."""
        search = _Search(graph, extents)
        for node in graph.nodes:
            meeting = search.visit(node)
            if meeting is not None:
                search.meetings.append((node, meeting))
        for node, meeting in search.meetings:
            if search.is_read_by_a_layer(node, meeting):
                return node
        return Mismatch("no values of different depths meet weights that compute from them", next(iter(graph.nodes)))


class _Search:
    """One walk over the graph, in topological order, that notes what every node holds."""

    def __init__(self, graph: Graph, extents: Sequence[Extent]) -> None:
        self.index, self.extents = indices(graph), extents
        self.on_stream = set[Node]().union(*(extent.values for extent in extents))
        self.held: dict[Node, _Held] = {}
        self.meetings: list[tuple[Node, _Held]] = []
        # Everything that a join puts beside something else, with the joins that do.
        self.joined: dict[Node, list[Node]] = {}

    def visit(self, node: Node) -> _Held | None:
        """Note what ``node`` holds; returns it where the values meet weights that compute from them."""
        name = op_name(node).strip("_")
        if node in self.on_stream:
            self.held[node] = _Held((node,))
            return self._met_in_sum(node, name)
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        if name == "setitem":
            self._write(node)
        elif name in _JOINS or name in _WRITES:
            self.held[node] = self._joined(node)
        elif name in _PRODUCTS or name in _ATTENTION:
            return self._met_in_product(node, name)
        elif name in ("sum", "mean"):
            return self._met_in_reduction(node)
        elif not is_mixer(node) and name not in _FORGETS:
            self.held[node] = self._passed_on(node, name)
            return self._met_in_sum(node, name)
        return None

    def _of(self, node: object) -> _Held:
        return self.held.get(node, _NOTHING) if isinstance(node, Node) else _NOTHING

    def _passed_on(self, node: Node, name: str) -> _Held:
        """The most that one operand holds; a product notes whether the other is weights."""
        sources = list(data_inputs(node))
        held = max((self._of(source) for source in sources), key=lambda h: len(h.values), default=_NOTHING)
        if held.several and name in ("mul", "rmul", "imul") and not held.weighted:
            others = [source for source in sources if self._of(source) is not held]
            weighted = any(self._computes_from(other, held, gated=True) for other in others)
            return dataclasses.replace(held, weighted=weighted)
        return held

    def _joined(self, node: Node) -> _Held:
        operands = [n for n in node.all_input_nodes if is_float_tensor(n) and not _is_empty(n)]
        held = [self._of(operand) for operand in operands]
        values = list(dict.fromkeys(value for h in held for value in h.values))
        for operand, h in zip(operands, held, strict=True):
            base = through_transparent(operand)
            if not h.values and base.op not in ("placeholder", "get_attr") and _may_be_value(base, operands, values):
                values.append(base)
        if len(operands) > 1:
            for value in values:
                self.joined.setdefault(value, []).append(node)
        joins = tuple(join for h in held for join in h.joins)[-2:]
        return _Held(tuple(values[-2:]), (*joins, (node, _depth(node, operands))))

    def _write(self, node: Node) -> None:
        """``buffer[i] = value``: from here on the buffer holds it too."""
        buffer, value = node.args[0], self._of(node.args[-1])
        while isinstance(buffer, Node) and value.values:
            before = self._of(buffer)
            values = tuple(dict.fromkeys((*before.values, *value.values)))
            # How many of its parts are read is told later, by a slice.
            self.held[buffer] = _Held(values[-2:], ((buffer, None),))
            buffer = buffer.args[0] if op_name(buffer) == "getitem" else None

    def _met_in_product(self, node: Node, name: str) -> _Held | None:
        # Of an attention the third is summed, with weights that are made of the others; one tensor may be both.
        named = (node.kwargs[key] for key in ("query", "key", "value") if key in node.kwargs)
        given = (*node.args, *named) if name in _ATTENTION else tuple(data_inputs(node))
        operands = [n for n in given if isinstance(n, Node) and is_float_tensor(n)]
        for operand in operands[2:3] if name in _ATTENTION else operands:
            held = self._of(operand)
            others = operands[:2] if name in _ATTENTION else [o for o in operands if o is not operand]
            if held.several and any(self._computes_from(other, held, gated=False) for other in others):
                return held
        return None

    def _met_in_reduction(self, node: Node) -> _Held | None:
        held = self._of(node.args[0] if node.args else None)
        if not held.weighted:
            return None
        sizes = _reduced_sizes(node)
        depths = [depth for _, depth in held.joins]
        return held if any(n is None or statically_known_true(s == n) for s in sizes for n in depths) else None

    def _met_in_sum(self, node: Node, name: str) -> _Held | None:
        """``a * x + b * x0``, where at least one factor computes from the values."""
        if name == "lerp" and len(node.args) == 3:
            terms, factors = list(node.args[:2]), [node.args[2]]
        elif name in _SUMS:
            terms, factors = list(node.args), []
        else:
            return None
        values, known = dict[Node, None](), True
        for term in terms:
            if isinstance(term, Node) and is_float_tensor(term):
                of_term, factor = self._weighted_term(through_transparent(term))
                known = known and bool(self._of(term).values)
                values.update(dict.fromkeys(of_term))
                factors += [] if factor is None else [factor]
        held = _Held(tuple(values))
        given = [factor for factor in factors if isinstance(factor, Node)]
        if not held.several or not given:
            return None
        if known:
            return held if any(self._computes_from(factor, held, gated=True) for factor in given) else None
        # Values that are on no stream are told from others, such as the outputs of experts, by weights that compute
        # from all of them.
        if not all(self._reached(factor, held, gated=True) >= set(values) for factor in given):
            return None
        for value in values:
            self.joined.setdefault(value, []).append(node)
        self.held[node] = held
        return held

    def _weighted_term(self, term: Node) -> tuple[Sequence[Node], Node | None]:
        """The values in one term of a sum, and the factor that it has."""
        found = self._of(term).values
        if term in self.on_stream or op_name(term).strip("_") not in ("mul", "rmul", "imul"):
            return found, None
        factors = [n for n in data_inputs(term) if is_float_tensor(n)]
        if found:
            return found, next((n for n in factors if not self._of(n).values), None)
        # One number for every token is a weight of what it multiplies.
        wide = [n for n in factors if not statically_known_true(require_tensor(n).shape[-1] == 1)]
        base = through_transparent(wide[0]) if len(wide) == 1 and len(factors) == 2 else None
        if base is None or base.op in ("placeholder", "get_attr"):
            return (), None
        return (base,), next(n for n in factors if n is not wide[0])

    def _computes_from(self, node: Node, held: _Held, *, gated: bool) -> bool:
        """Whether ``node`` computes from the values, or from where they are joined; perhaps through a gate only."""
        return bool(self._reached(node, held, gated=gated))

    def _reached(self, node: Node, held: _Held, *, gated: bool) -> set[Node]:
        """Which of the values, and of the nodes that join them, ``node`` computes from."""
        targets = {*held.values, *(join for join, _ in held.joins)}
        earliest = min(self.index[target] for target in targets)
        passed = {node: _is_gate(node) or not gated}
        pending, reached = [(-self.index[node], node)], set()
        while pending:
            _, current = heapq.heappop(pending)
            if current in targets:
                reached |= {current} if passed[current] else set()
                if held.joins and reached:
                    return reached
                continue
            for source in data_inputs(current):
                if self.index[source] < earliest:
                    continue
                if source not in passed:
                    heapq.heappush(pending, (-self.index[source], source))
                    passed[source] = False
                passed[source] |= passed[current] or (source not in targets and _is_gate(source))
        return reached

    def is_read_by_a_layer(self, node: Node, met: _Held) -> bool:
        """Whether a branch output of a stream of these values, or a later one of them, computes from ``node``."""
        scopes = {e.stream.scope for e in self.extents if not e.values.isdisjoint(met.values)}
        if any(node in e.feeding or node in e.values for e in self.extents if e.stream.scope in scopes):
            return True
        # Without a sum of branch outputs: what is computed from here stands beside the same values again.
        shared = {join for value in met.values for join in self.joined.get(value, ())}
        later = (v for v, joins in self.joined.items() if self.index[v] > self.index[node] and shared & set(joins))
        first = min(later, key=self.index.__getitem__, default=None)
        return first is not None and self._computes_from(first, _Held((node,)), gated=False)


def _is_gate(node: Node) -> bool:
    return op_name(node).strip("_") in _GATES or is_mixer(node)


def _is_empty(node: Node) -> bool:
    return statically_known_true(require_tensor(node).numel() == 0)


def _may_be_value(base: Node, operands: Sequence[Node], values: Iterable[Node]) -> bool:
    """Whether what stands beside values in a join is as large as they are, so that it may be one too."""
    others = [*values, *(through_transparent(operand) for operand in operands)]
    size = require_tensor(base).numel()
    return any(other is not base and statically_known_true(require_tensor(other).numel() == size) for other in others)


def _depth(node: Node, operands: Sequence[Node]) -> Any:
    """How many values a join has side by side."""
    if op_name(node) in ("cat", "concat", "concatenate"):
        dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
        return _size(node, dim)
    return len(operands)


def _size(node: Node, dim: object) -> Any:
    shape = require_tensor(node).shape if is_float_tensor(node) else ()
    return shape[dim] if isinstance(dim, int) and -len(shape) <= dim < len(shape) else None


def _reduced_sizes(node: Node) -> list[Any]:
    """The sizes of the dimensions that a sum or mean is over."""
    source = node.args[0]
    if not is_float_tensor(source):
        return []
    shape = require_tensor(source).shape
    dims = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    dims = range(len(shape)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    return [shape[dim] for dim in dims if isinstance(dim, int)]
