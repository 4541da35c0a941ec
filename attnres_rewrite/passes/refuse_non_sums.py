"""Pass 5: a model whose residual connections are no sums, or not all of them, is not rewritten."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.errors import NoResidualStreamError, UnsupportedResidualError
from attnres_rewrite.graph.memory import aliases_of, overwritten_by
from attnres_rewrite.graph.nodes import module_path, source_line
from attnres_rewrite.passes.base import Pass, Refusal
from attnres_rewrite.passes.find_streams import StreamAnalysis
from attnres_rewrite.passes.nesting import Nesting
from attnres_rewrite.patterns import through_transparent
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.mixture import Mixture
from attnres_rewrite.patterns.operators import is_dropout
from attnres_rewrite.patterns.piece import Piece
from attnres_rewrite.patterns.refusal import (
    GATED,
    HYPER_CONNECTIONS,
    POST_NORM,
    GatedStream,
    GateMatch,
    HyperConnections,
    PostNorm,
)
from attnres_rewrite.patterns.stream_scale import scaled_values
from attnres_rewrite.streams import ResidualStream

TRANSFORMED = (
    "the residual stream is changed between its adds by something that is no scale, so it is not a sum of branch "
    "outputs and Attention Residuals are not defined for it"
)
DROPPED = (
    "dropout on the residual stream itself, so the stream is not a sum of branch outputs in training and Attention "
    "Residuals are not defined for it. Drop out what is added; in a graph that is never trained, set its p to zero"
)
REVERSIBLE = (
    "coupled streams: a second sum of branch outputs is carried from sublayer to sublayer within the branches of the "
    "first, as in a reversible network, so neither is the one stream to attend over"
)
OVERWRITTEN = (
    "a part of the residual stream is overwritten in place between two of its adds, so it is not a sum of branch "
    "outputs and Attention Residuals are not defined for it"
)
SHARED = "a residual add overwrites in place a tensor that is used elsewhere as well: write x = x + f(x)"


class RefuseNonSums(Pass):
    """Find what is no sum of branch outputs, or breaks one into pieces: a norm or a gate on the stream, and others.

    A stream that goes on behind a norm or a gate is found in pieces, of which any may be a single add. So
    where a piece begins with the changed end of another, or an add gates one, nothing may be rewritten.
    """

    def call(self, module: GraphModule, analysis: StreamAnalysis) -> tuple[Refusal, ...]:
        """The refusals, the most telling first; ``module`` is not changed."""
        found, index = analysis.values, analysis.values.index
        reasons = [(SHARED, add) for add in found.shared]
        reasons += [(OVERWRITTEN, node) for stream in analysis.streams for node in _overwriting(stream, index)]
        # To a chain of adds that is a branch of a gated stream, that one looks like a bias.
        steps = (value.step for value in found.values.values() if value.step is not None)
        biased = [step.node for step in steps if any(addend.kind == "bias" for addend in step.addends)]
        reasons += _broken(analysis.pieces, [*found.rejected, *biased], index)
        reasons += [(REVERSIBLE, root) for root in _coupled(analysis)]
        if not reasons and not analysis.streams:
            return (Refusal("", _no_stream(analysis)),)
        return tuple(
            Refusal(module_path(node), UnsupportedResidualError(f"{reason} (at {source_line(node)})"))
            for reason, node in reasons
        )

    def summary(self, result: tuple[Refusal, ...]) -> str:
        """Counts for the log."""
        return f"{len(result)} refusals"


def _broken(pieces: Sequence[Piece], rejected: Sequence[Node], index: dict[Node, int]) -> list[tuple[str, Node]]:
    """What the residual connections of a graph are that are no stream, or break one into pieces.

    A stream that goes on behind a norm or a gate is found in pieces, of which any may be a single add. So
    where a piece begins with the changed end of another, or an add gates one, nothing may be rewritten.

    Args:
        pieces: The streams, and the other chains of adds.
        rejected: The adds that are on no chain.
        index: The topological order.

    Returns:
        A reason and its place for every piece or add; none if all is well, or if no known reason applies.
    """
    post_norm, transformed = [], []
    piece_of = {end: piece for piece in pieces for end in piece.ends}
    values = set().union(*(piece.values for piece in pieces)) - piece_of.keys()
    for piece in pieces:
        found = PostNorm().match(piece.root, piece_of.keys() - piece.ends, values - {piece.root})
        if isinstance(found, Mismatch):
            continue
        norms = [continuation.norm for continuation in found if continuation.norm is not None]
        if len(norms) == len(found):
            # A norm between two towers is the first one's last.
            norms = [c.norm for c in found if c.norm is not None and piece_of[c.end].may_go_on_in(piece)]
        elif not norms:
            transformed.append((DROPPED if is_dropout(piece.root) else TRANSFORMED, piece.root))
        # On some way there may be no norm, where one is written by hand: x * rsqrt(...).
        post_norm += [(POST_NORM, norm) for norm in norms[:1]]

    # A head's sum of the layers' outputs, by weights that compute from them, gates no stream.
    on_streams = set().union(*(piece.values | {piece.root} for piece in pieces))
    adds = [add for add in rejected if isinstance(Mixture().match(add, on_streams), Mismatch)]
    gates = [gate for add in adds if isinstance(gate := GatedStream().match(add, index), GateMatch)]
    streams = [piece for piece in pieces if piece.is_stream]
    certain = [
        gate
        for gate in gates
        if any(value in piece_of for value in scaled_values(gate.stream))
        or any(gate.holds(piece, index) for piece in streams or pieces)
    ]
    sure = [(GATED, gate.product) for gate in certain if not gate.is_norm]
    # What a norm written by hand multiplies by is a gate too, but should not be called one.
    post_norm += [(GATED, gate.product) for gate in certain if gate.is_norm]
    if streams:
        return sure + post_norm + transformed
    mixed = [mixing for add in rejected if isinstance(mixing := HyperConnections().match(add, index), Node)]
    return [
        *sure,
        *post_norm,
        # Without a stream anything that looks like a gate is taken for one.
        *((GATED, gate.product) for gate in gates),
        *((HYPER_CONNECTIONS, mixing) for mixing in mixed),
        *transformed,
    ]


def _overwriting(stream: ResidualStream, index: dict[Node, int]) -> Iterator[Node]:
    """What changes, in place, a part of a stream value that a later step still needs, or a term of its sums."""
    forever = len(index)
    kept = [(stream.root, index[stream.steps[0].node], forever)]
    for step in stream.steps:
        end = index[step.node]
        for addend in step.addends:
            if addend.kind != "value":
                kept.append((addend.node, end, forever))
                continue
            if addend.node is stream.root:
                # What is filled in before the first step belongs to the root.
                continue
            sides = (n for n in step.node.all_input_nodes if through_transparent(n) is addend.node)
            kept += [(node, index[addend.node], end) for node in {addend.node, *sides}]
    own = {step.node for step in stream.steps}
    for node, start, stop in kept:
        aliases = aliases_of(node)
        users = (user for alias in aliases for user in alias.users if user not in own)
        writing = (user for user in users if not aliases.isdisjoint(overwritten_by(user)))
        yield from (user for user in writing if start < index[user] < stop)


def _coupled(analysis: StreamAnalysis) -> Iterator[Node]:
    """The root of every chain that goes on from one branch of a stream to the next."""
    nesting, index = Nesting(analysis.values), analysis.values.index
    for piece, stream in itertools.product(analysis.pieces, analysis.streams):
        last = max(piece.ends, key=index.__getitem__)
        if nesting.is_coupled(piece.root, last, len(piece.values), stream):
            yield piece.root


def _no_stream(analysis: StreamAnalysis) -> NoResidualStreamError:
    return NoResidualStreamError(
        "no residual stream was found: no chain of adds x = x + f(x) runs over at least two sublayers."
        + ("" if analysis.rejected else " The traced graph adds no two tensors.")
    )
