"""Residual connections that are recognised in order to be refused, each with its own reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Container

from torch.fx import Node

from attnres_rewrite.graph.nodes import (
    data_inputs,
    depends_on,
    is_float_tensor,
    op_name,
    require_tensor,
    same_shape,
    submodule_of,
)
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_sum import LinearSum
from attnres_rewrite.patterns.operators import is_mixer
from attnres_rewrite.patterns.piece import Piece
from attnres_rewrite.patterns.stream_scale import scaled_values
from attnres_rewrite.patterns.transparent import through_transparent

_NORMS = frozenset("layer_norm rms_norm native_layer_norm group_norm batch_norm rsqrt std var".split())
POST_NORM = (
    "post-norm: a norm sits on the residual stream itself, so the stream is not a sum of branch "
    "outputs and Attention Residuals are not defined for it. Use a pre-norm variant of the model"
)
GATED = (
    "gated stream: the residual stream is multiplied by a gate that is computed from it, so the stream is "
    "not a sum of branch outputs and Attention Residuals are not defined for it"
)
HYPER_CONNECTIONS = (
    "hyper-connections: several residual streams side by side are mixed by a matrix between the sublayers, "
    "so there is no one stream of branch outputs to attend over"
)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A piece begins with what another one ends in, changed.

    Attributes:
        end: The end of the other piece.
        norm: The norm on the way, if there is one.
    """

    end: Node
    norm: Node | None


class PostNorm:
    """A norm sits on the stream itself, so there is no running sum to attend over.

    ::

        x ─┬─► sublayer ─► (+) ─► norm ─┬─► sublayer ─► (+) ─► norm ─► ...
           └────────────────┘           └────────────────┘

    Recognised from the root of one chain of adds: it is the normalised end of another chain.
    """

    name = "post-norm"

    def match(self, root: Node, ends: Container[Node], stops: Container[Node]) -> list[Continuation] | Mismatch:
        """Which of the chain ends lead to ``root`` without a sublayer between, and the norm on every way.

        Args:
            root: Where the search backwards begins.
            ends: What is looked for.
            stops: What is not searched beyond, like a sublayer.
        """
        pending: list[tuple[Node, Node | None]] = [(root, None)]
        seen, found = {(root, False)}, []
        while pending:
            node, norm = pending.pop()
            if node in ends:
                found.append(Continuation(node, norm))
                continue
            if node in stops or is_mixer(node):
                continue
            if op_name(node) in _NORMS or "norm" in f"{type(submodule_of(node)).__name__}{node.target}".lower():
                norm = norm or node
            fresh = [n for n in data_inputs(node) if (n, norm is not None) not in seen]
            seen.update((n, norm is not None) for n in fresh)
            pending.extend((n, norm) for n in fresh)
        return found or Mismatch("no other chain of adds leads here but through a sublayer", root)


@dataclasses.dataclass(frozen=True)
class GateMatch:
    """The multiplication by the gate, the two that it multiplies, and what is added to the product."""

    product: Node
    stream: Node
    gate: Node
    branch: Node

    @property
    def is_norm(self) -> bool:
        """Whether the gate is the size of the stream value, as in a norm written by hand."""
        return op_name(through_transparent(self.gate)) in _NORMS

    def holds(self, piece: Piece, index: dict[Node, int]) -> bool:
        """Whether ``piece`` begins in the branch, and ends in it or is it."""
        return _computes_from(piece.root, self.stream, index) and (
            self.branch in piece.values or any(_computes_from(self.branch, end, index) for end in piece.ends)
        )


class GatedStream:
    """The stream is multiplied by something that is computed from it.

    ::

        x ─┬─► gate ─► g ─► (*) ─► (+) ─► g * x + f(x)
           ├────────────────┘       │
           └─► sublayer ────────────┘

    A gate is no linear map, so it does not distribute over the sources.
    """

    name = "gated stream"

    def match(self, add: Node, index: dict[Node, int]) -> GateMatch | Mismatch:
        """The multiplication by the gate, if ``add`` adds a branch to a gated stream."""
        for operand, branch in _both_ways(add):
            for product in scaled_values(operand):
                factors = [n for n in product.args[:2] if isinstance(n, Node) and is_float_tensor(n)]
                if op_name(product) != "mul" or len(factors) != 2:
                    continue
                for stream, gate in (factors, factors[::-1]):
                    stream = through_transparent(stream)
                    if _computes_from(gate, stream, index) and _computes_from(branch, stream, index):
                        return GateMatch(product, stream, gate, branch)
        return Mismatch("no operand is a gated stream", add)


class HyperConnections:
    """Several streams side by side, which a matrix mixes where a residual stream is merely passed on.

    ::

        X ─┬─► M @ X ───────────────────────► (+) ─► M @ X + p f(X)        X: [..., n, D], M: [..., n, n]
           └─► mix ─► sublayer ─► f ─► (* p) ──┘

    Depth attention is over one stream; what n mixed ones would attend over is another architecture.
    """

    name = "hyper-connections"

    def match(self, add: Node, index: dict[Node, int]) -> Node | Mismatch:
        """The mixing, if ``add`` adds a branch to mixed streams."""
        for mixed, branch in _both_ways(add):
            mixed = through_transparent(mixed)
            while op_name(mixed) == "getitem" and isinstance(mixed.args[0], Node):
                mixed = through_transparent(mixed.args[0])
            if op_name(mixed) not in ("matmul", "bmm", "einsum"):
                continue
            streams = (through_transparent(source) for source in data_inputs(mixed) if _is_wide(source, mixed))
            if any(_computes_from(branch, stream, index) for stream in streams):
                return mixed
        return Mismatch("no operand is a mixture of streams", add)


def _both_ways(add: Node) -> tuple[tuple[Node, Node], ...]:
    """The operands of a sum of two tensors of one shape, in either order."""
    match = LinearSum().match(add)
    if isinstance(match, Mismatch) or len(match.addends) != 2:
        return ()
    (left, _), (right, _) = match.addends
    if not same_shape(require_tensor(left), require_tensor(right)):
        return ()
    return (left, right), (right, left)


def _is_wide(source: Node, mixed: Node) -> bool:
    """Whether ``source`` is several streams ``[..., n, D]`` that ``mixed`` may be a mixture of."""
    if not is_float_tensor(source):
        return False
    before, after = require_tensor(source).shape, require_tensor(mixed).shape
    return len(before) == len(after) >= 4 and bool(before[-1] == after[-1]) and bool(before[:-2] == after[:-2])


def _computes_from(node: Node, value: Node, index: dict[Node, int]) -> bool:
    if node is value or index[node] < index[value]:
        return False
    return depends_on(node, lambda other: other is value, index[value], index)
