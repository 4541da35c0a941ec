"""Pass 7: no sublayer is left out of what is rewritten."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.graph.extent import Extent
from attnres_rewrite.graph.memory import overwritten_by, writers_of
from attnres_rewrite.graph.nodes import (
    bodies_of,
    data_inputs,
    indices,
    is_float_tensor,
    module_path,
    op_name,
    require_tensor,
    same_shape,
    source_line,
)
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.layer_list import Layer, layer_lists
from attnres_rewrite.patterns.mixture import Mixture
from attnres_rewrite.patterns.operators import is_convolution, is_mixer
from attnres_rewrite.patterns.stream_scale import scaled_values
from attnres_rewrite.streams import RejectedAdd

STAYS_PLAIN = "a sublayer would stay plain: it is on no residual stream that was found, and in no branch of one"
CUT_OFF = "a layer would be cut off from those beside it: the residual stream does not lead from them to it as a sum"
REMEDY = (
    "To rewrite the streams that were found, or those of them that AttnResConfig(streams=...) names, and accept the "
    'rest as it is, set AttnResConfig(leftovers="plain")'
)

# For every node whose memory something overwrites: the nodes that do.
Writers = Mapping[Node, Sequence[Node]]
# What adds two tensors, with whatever factors; in place too, and as methods.
_SUMS = frozenset("add sub rsub radd iadd isub lerp addcmul addmm baddbmm".split())


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A sublayer that would stay plain.

    Attributes:
        node: Where it is in the graph.
        module: The module that it belongs to.
        reason: Why it is on no stream.
        is_cut_off: Whether it is on one after all, but apart from the layers beside it.
    """

    node: Node
    module: str
    reason: str
    is_cut_off: bool = False

    @property
    def error(self) -> UnsupportedResidualError:
        """What to tell the user."""
        what = CUT_OFF if self.is_cut_off else STAYS_PLAIN
        return UnsupportedResidualError(f"{what}. {REMEDY} ({self.reason}; at {source_line(self.node)})")


class AccountForSublayers(Pass):
    """Find every sublayer that is on no stream and in no branch of one.

    Two nets. The first is data flow: an add ``x + f(x)``, where ``f`` multiplies by weights or mixes tokens, must be a
    step of a stream, or lie within a branch. The second is the module tree: where children of a list of
    layers have branches of a stream, every other child of their kind that ran must have some too. It finds what no add
    shows: an operator that adds and norms in one, a region that is compiled on its own.
    """

    def call(
        self, module: GraphModule, extents: Sequence[Extent], rejected: Sequence[RejectedAdd]
    ) -> tuple[Leftover, ...]:
        """The sublayers of ``module``, which is not changed, that the streams with these extents leave out."""
        accounted = set[Node]().union(*(extent.accounted for extent in extents))
        reasons = {r.node: r.reason for r in rejected}
        left = [*_left_out_adds(module.graph, extents, reasons), *_hidden_adds(module, accounted)]
        return (*left, *_odd_layers(module.graph, extents))

    def summary(self, result: tuple[Leftover, ...]) -> str:
        """Counts for the log."""
        return f"{len(result)} sublayers left out"


def _left_out_adds(graph: Graph, extents: Sequence[Extent], reasons: dict[Node, str]) -> Iterator[Leftover]:
    index, writers = indices(graph), writers_of(graph)
    values = frozenset[Node]().union(*(extent.values for extent in extents))
    accounted = set[Node]().union(*(extent.accounted for extent in extents))
    on_streams = values.union(extent.stream.root for extent in extents)
    states, live = set[Node](), _live(graph)
    begin = min((index[extent.stream.root] for extent in extents), default=0)
    for node in graph.nodes:
        if (
            node in accounted
            or node not in live
            or (base := added_to(node, index, values, writers)) is None
            or _is_of_another_kind(node)
            or not isinstance(Mixture().match(node, on_streams), Mismatch)
            or (index[node] < begin and _is_part(base))
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
    return f"what it adds to is the result of {op_name(base) or base.target} ({source_line(base)})"


def added_to(
    node: Node, index: dict[Node, int], values: Container[Node] = (), writers: Writers = MappingProxyType({})
) -> Node | None:
    """The value ``x`` to which ``node`` adds a sublayer's ``f(x)``, if it does so.

    What lies behind one of ``values`` is accounted for: a long skip around a whole stream adds no sublayer of its own.
    """
    terms = _terms(node)
    for term in terms:
        bases = list(scaled_values(term))
        # Of an operator with several results, another one may be what the sublayer computes from.
        whole = {base.args[0] if op_name(base) == "getitem" else base for base in bases}
        known = {*bases, *(base for base in whole if isinstance(base, Node))}
        if any(other is not term and _mixes(other, known, index, values, writers) for other in terms):
            return bases[-1]
    return None


def _is_of_another_kind(add: Node) -> bool:
    """Whether a lone add is no layer of a stream ``[..., T, D]``: of a pooled token, or of channels before a grid."""
    *outer, _ = require_tensor(add).shape
    one_token = len(outer) > 1 and all(statically_known_true(size == 1) for size in outer[1:])
    return one_token or (len(outer) > 2 and _is_convolved(add))


def _is_part(node: Node) -> bool:
    """Whether ``node`` is a slice of a tensor: of the tokens but one, say, which take in some of their neighbours."""
    source = node.args[0] if node.args else None
    if (
        op_name(node) not in ("getitem", "slice", "narrow")
        or not isinstance(source, Node)
        or not is_float_tensor(source)
    ):
        return False
    part, whole = require_tensor(node), require_tensor(source)
    return part.dim() == whole.dim() and not same_shape(part, whole)


def _is_convolved(node: Node) -> bool:
    """Whether the first operators that make a sublayer, going back from ``node``, are all convolutions."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_mixer(current):
            if not is_convolution(current):
                return False
            continue
        fresh = [source for source in data_inputs(current) if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return True


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


def _mixes(
    node: Node, bases: Iterable[Node], index: dict[Node, int], values: Container[Node], writers: Writers
) -> bool:
    """Whether ``node`` computes from one of ``bases`` through an operator that makes a sublayer, and no value."""
    targets = set(bases)
    earliest = min(index[base] for base in targets)
    mixed = {node: node not in targets and is_mixer(node)}
    pending = [(-index[node], node)]
    while pending:
        _, current = heapq.heappop(pending)
        if current in targets:
            if mixed[current]:
                return True
            continue
        sources = (*data_inputs(current), *writers.get(current, ())) if current not in values else ()
        for source in sources:
            if index[source] < earliest:
                continue
            if source not in mixed:
                heapq.heappush(pending, (-index[source], source))
            mixed[source] = mixed.get(source, False) or mixed[current] or (source not in targets and is_mixer(source))
    return False


def _hidden_adds(module: GraphModule, accounted: Container[Node]) -> Iterator[Leftover]:
    """Adds of sublayers in the graphs that an operator of this one runs, such as a region compiled on its own."""
    for node in module.graph.nodes:
        if not isinstance(node.target, _compat.HigherOrderOperator) or node in accounted:
            continue
        for body in bodies_of(node):
            index = indices(body.graph)
            for inner in body.graph.nodes:
                if added_to(inner, index) is not None:
                    reason = f"it lies in the graph of a {op_name(node)}, which is not looked into"
                    yield Leftover(inner, module_path(node), reason)


def _odd_layers(graph: Graph, extents: Sequence[Extent]) -> Iterator[Leftover]:
    """Children of a list of layers that ran and are on no stream, or on one of their own, unlike others of a kind."""
    for layers in layer_lists(graph, extents, _live(graph)):
        having = [layer for layer in layers if layer.streams]
        shared = {s for a, b in itertools.pairwise(having) for s in a.streams & b.streams}
        regular = [layer for layer in having if layer.streams & shared] or having
        for layer in layers:
            like = next((other for other in regular if layer.is_like(other)), None)
            if like is None or layer.streams & shared:
                continue
            if not layer.streams:
                reason = f"module {layer.path!r} ran without an add on a stream, as there is in {like.path!r}"
                yield Leftover(layer.first, layer.path, reason)
            elif shared and (apart := _apart(layer, like, extents)) is not None:
                reason = (
                    f"module {layer.path!r} has a stream of its own, apart from that of {like.path!r}; {_origin(apart)}"
                )
                yield Leftover(layer.first, layer.path, reason, is_cut_off=True)


def _apart(layer: Layer, like: Layer, extents: Sequence[Extent]) -> Node | None:
    """The root of the stream of ``layer``, if it could be the rest of that of ``like``: if it is as large."""
    mine, theirs = (extents[min(one.streams)].stream.root for one in (layer, like))
    return mine if same_shape(require_tensor(mine), require_tensor(theirs)) else None


def _live(graph: Graph) -> set[Node]:
    """The nodes that an output computes from, or what is written in place."""
    live = {node for node in graph.nodes if node.op == "output" or overwritten_by(node)}
    pending = list(live)
    while pending:
        fresh = [source for source in pending.pop().all_input_nodes if source not in live]
        live.update(fresh)
        pending.extend(fresh)
    return live
