"""Residual connections that are recognised in order to be refused, each with its own reason."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Container, Sequence

from torch import nn
from torch.fx import Node

from attnres_rewrite import _compat
from attnres_rewrite.graph import (
    data_inputs,
    depends_on,
    is_float_tensor,
    op_name,
    require_tensor,
    same_shape,
    submodule_of,
)
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.linear_sum import LinearSum
from attnres_rewrite.patterns.stream_scale import scaled_values
from attnres_rewrite.patterns.transparent import through_transparent

_NORMS = frozenset("layer_norm rms_norm native_layer_norm group_norm batch_norm rsqrt std var".split())
_MIXERS = frozenset(
    (
        "linear matmul bmm mm addmm einsum conv1d conv2d conv3d embedding scaled_dot_product_attention baddbmm "
        "multi_head_attention_forward"
    ).split()
)
# The same as modules, in a graph that calls these.
_MIXING_MODULES = (nn.Linear, _compat.Convolution, nn.Embedding, nn.MultiheadAttention)

TRANSFORMED = (
    "the residual stream is changed between its adds by something that is no scale, so it is not a sum of branch "
    "outputs and Attention Residuals are not defined for it"
)
DROPPED = (
    "dropout on the residual stream itself, so the stream is not a sum of branch outputs in training and Attention "
    "Residuals are not defined for it. Drop out what is added; in a graph that is never trained, set its p to zero"
)
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
REVERSIBLE = (
    "coupled streams: a second sum of branch outputs is carried from sublayer to sublayer within the branches of the "
    "first, as in a reversible network, so neither is the one stream to attend over"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A chain of adds ``x + f(x)``: a residual stream, or what may be a part of one.

    Attributes:
        first_module: The module that its first add runs in.
        last_module: That of its last add.
        root: The value that it begins with.
        values: Its stream values.
        ends: The last of them, before and after trailing scales.
        is_stream: Whether it is a stream by itself.
    """

    first_module: str
    last_module: str
    root: Node
    values: frozenset[Node]
    ends: frozenset[Node]
    is_stream: bool

    def may_go_on_in(self, other: Piece) -> bool:
        """Whether ``other`` could be the rest of the stream that this is a piece of, and not another tower."""
        if not (self.is_stream or other.is_stream):
            return True
        paths = [path.split(".") if path else [] for path in (self.last_module, other.first_module)]
        here, there = next(((a, b) for a, b in itertools.zip_longest(*paths) if a != b), (None, None))
        if here is None or there is None:
            # One lies within the other. Of two streams it then is a tower; a single add is a part.
            return here is there or not (self.is_stream and other.is_stream)
        # layers.3 and layers.4, or layer_3 and layer_4.
        return here[-1].isdigit() and there[-1].isdigit() and here.rstrip(string.digits) == there.rstrip(string.digits)


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

    def match(self, root: Node, ends: Container[Node], stops: Container[Node]) -> list[Continuation] | Rejection:
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
        return found or Rejection("no other chain of adds leads here but through a sublayer", root)


@dataclasses.dataclass(frozen=True)
class GateMatch:
    """The multiplication by the gate, the stream value that it multiplies, and what is added to the product."""

    product: Node
    stream: Node
    branch: Node

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

    def match(self, add: Node, index: dict[Node, int]) -> GateMatch | Rejection:
        """The multiplication by the gate, if ``add`` adds a branch to a gated stream."""
        for operand, branch in _both_ways(add):
            for product in scaled_values(operand):
                factors = [n for n in product.args[:2] if isinstance(n, Node) and is_float_tensor(n)]
                if op_name(product) != "mul" or len(factors) != 2:
                    continue
                for stream, gate in (factors, factors[::-1]):
                    stream = through_transparent(stream)
                    if _computes_from(gate, stream, index) and _computes_from(branch, stream, index):
                        return GateMatch(product, stream, branch)
        return Rejection("no operand is a gated stream", add)


class HyperConnections:
    """Several streams side by side, which a matrix mixes where a residual stream is merely passed on.

    ::

        X ─┬─► M @ X ───────────────────────► (+) ─► M @ X + p f(X)        X: [..., n, D], M: [..., n, n]
           └─► mix ─► sublayer ─► f ─► (* p) ──┘

    Depth attention is over one stream; what n mixed ones would attend over is another architecture.
    """

    name = "hyper-connections"

    def match(self, add: Node, index: dict[Node, int]) -> Node | Rejection:
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
        return Rejection("no operand is a mixture of streams", add)


def is_mixer(node: Node) -> bool:
    """Whether ``node`` is the kind of operator that makes a sublayer: it multiplies by weights, or mixes tokens."""
    return op_name(node) in _MIXERS or isinstance(submodule_of(node), _MIXING_MODULES)


def is_convolution(node: Node) -> bool:
    """Whether ``node`` is a mixer whose channels are not the last dimension."""
    return op_name(node).startswith("conv") or isinstance(submodule_of(node), _compat.Convolution)


def is_dropout(node: Node) -> bool:
    """Whether ``node`` drops out, now or in training."""
    return op_name(node) == "dropout" or isinstance(submodule_of(node), nn.Dropout)


def _both_ways(add: Node) -> tuple[tuple[Node, Node], ...]:
    """The operands of a sum of two tensors of one shape, in either order."""
    match = LinearSum().match(add)
    if isinstance(match, Rejection) or len(match.addends) != 2:
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


def explain_refusals(pieces: Sequence[Piece], rejected: Sequence[Node], index: dict[Node, int]) -> list[Rejection]:
    """What the residual connections of a graph are that are no stream, or break one into pieces.

    A stream that goes on behind a norm or a gate is found in pieces, of which any may be a single add. So
    where a piece begins with the changed end of another, or an add gates one, nothing may be rewritten.

    Args:
        pieces: The streams, and the other chains of adds.
        rejected: The adds that are on no chain.
        index: The topological order.

    Returns:
        One rejection a piece or add, with its reason; none if all is well, or if no known reason applies.
    """
    post_norm, transformed = [], []
    piece_of = {end: piece for piece in pieces for end in piece.ends}
    values = set().union(*(piece.values for piece in pieces)) - piece_of.keys()
    for piece in pieces:
        found = PostNorm().match(piece.root, piece_of.keys() - piece.ends, values - {piece.root})
        if isinstance(found, Rejection):
            continue
        norms = [continuation.norm for continuation in found if continuation.norm is not None]
        if len(norms) == len(found):
            # A norm between two towers is the first one's last.
            norms = [c.norm for c in found if c.norm is not None and piece_of[c.end].may_go_on_in(piece)]
        elif not norms:
            transformed.append(Rejection(DROPPED if is_dropout(piece.root) else TRANSFORMED, piece.root))
        # On some way there may be no norm, where one is written by hand: x * rsqrt(...).
        post_norm += [Rejection(POST_NORM, norm) for norm in norms[:1]]

    gates = [gate for add in rejected if isinstance(gate := GatedStream().match(add, index), GateMatch)]
    streams = [piece for piece in pieces if piece.is_stream]
    sure = [
        Rejection(GATED, gate.product)
        for gate in gates
        if any(value in piece_of for value in scaled_values(gate.stream))
        or any(gate.holds(piece, index) for piece in streams or pieces)
    ]
    if streams:
        return sure + post_norm + transformed
    mixed = [mixing for add in rejected if isinstance(mixing := HyperConnections().match(add, index), Node)]
    return [
        *sure,
        *post_norm,
        # Without a stream anything that looks like a gate is taken for one.
        *(Rejection(GATED, gate.product) for gate in gates),
        *(Rejection(HYPER_CONNECTIONS, mixing) for mixing in mixed),
        *transformed,
    ]
