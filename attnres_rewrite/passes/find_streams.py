"""Pass 4: which adds make up a residual stream."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.graph.nodes import (
    module_path,
    module_stack,
    require_tensor,
    sequential_paths,
)
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.linear_values import LinearValues, Value
from attnres_rewrite.passes.nesting import Nesting
from attnres_rewrite.patterns import reads_of
from attnres_rewrite.patterns.linear_step import linear_step
from attnres_rewrite.patterns.linear_sum import is_sum
from attnres_rewrite.patterns.piece import Piece
from attnres_rewrite.streams import Branch, RejectedAdd, ResidualStream, Step


@dataclasses.dataclass(frozen=True)
class StreamAnalysis:
    """What :class:`FindStreams` found.

    Attributes:
        streams: Every residual stream, in graph order.
        rejected: Every add that was considered and is on no stream, with the reason.
        pieces: The streams, and the chains of adds that are neither a part of one nor nested in a branch of one.
        lone: Adds ``x + f(x)`` of a sublayer that are on no stream: in a part of a model, a part of one.
        values: The linear values among which the streams were found.
    """

    streams: tuple[ResidualStream, ...]
    rejected: tuple[RejectedAdd, ...]
    pieces: tuple[Piece, ...]
    lone: tuple[Node, ...]
    values: LinearValues


class FindStreams(Pass):
    """Find every stream: the values that are linear combinations of a root and of branch outputs, by data flow.

    ::

        root ─► (+ f_1) ─► (* c) ─► (+ f_2) ─► (+ c' * root) ─► ... ─► end

    A sum of a value and of something that computes from the stream adds a branch output, one of two values links them.
    A sum of ``x`` and something that computes from ``x`` begins a family of values. The stream is what its deepest
    value is a linear function of. A chain that begins and ends inside one branch of another stream is nested, and no
    stream of its own.
    """

    def call(self, module: GraphModule) -> StreamAnalysis:
        """The streams of ``module``, which is not changed."""
        found = LinearValues(module)
        for node in module.graph.nodes:
            if is_sum(node):
                found.consider(node)
        search = _Search(found)
        streams = search.streams()
        pieces = search.pieces(streams)
        rejected = search.all_rejected(streams, pieces)
        ends = itertools.chain.from_iterable(piece.ends for piece in pieces if not piece.is_stream)
        lone = tuple(end for end in ends if search.nesting.adds_sublayer(end))
        return StreamAnalysis(tuple(streams), rejected, tuple(pieces), lone, found)

    def ensures(self, module: GraphModule, result: StreamAnalysis) -> None:
        """No node is a step of two streams."""
        steps = [step.node for stream in result.streams for step in stream.steps]
        if len(steps) != len(set(steps)):
            raise PostconditionError("one add was found on two streams")

    def summary(self, result: StreamAnalysis) -> str:
        """Counts for the log."""
        branches = [len(stream.branches) for stream in result.streams]
        return f"{len(result.streams)} streams with {branches} branches, {len(result.rejected)} adds rejected"


class _Search:
    """Chooses the streams among the families of linear values."""

    def __init__(self, found: LinearValues) -> None:
        self.found, self.index, self.values = found, found.index, found.values
        self.nesting = Nesting(found)

    def streams(self) -> list[ResidualStream]:
        """The stream of every family, without those that are nested in a branch of another."""
        found = [s for end in self._ends() if (s := self._stream(end)) is not None]
        streams: list[ResidualStream] = []
        # The streams that have begun and not ended: no other can hold the next one.
        around: list[ResidualStream] = []
        for stream in sorted(found, key=lambda s: self.index[s.root]):
            start, last = self.index[stream.root], stream.branches[-1].value
            around = [other for other in around if self.index[other.branches[-1].value] > start]
            adds = sum(len(branch.adds) for branch in stream.branches)
            if not any(self.nesting.is_nested(stream.root, last, adds, other) for other in around):
                streams.append(stream)
            around.append(stream)
        return streams

    def _ends(self) -> list[Value]:
        """The deepest value of every family, without the values that are inside a branch."""
        extended = {source for value in self.values.values() for source in value.sources}
        consumed: set[Value] = set()
        for value, inside in self.found.inside.items():
            # A sum of depth one that nothing follows is a long skip: the root added to the result of the whole stream.
            # The stream lies inside its branch, and is a stream all the same.
            if value.depth > 1 or value in extended:
                consumed |= inside
        ends: dict[Value, Value] = {}
        for value in self.values.values():
            # Of two of one depth the later one wins: it may compute from the other.
            is_end = value.is_sum and value not in consumed
            if is_end and value.depth >= ends.get(value.root, value.root).depth:
                ends[value.root] = value
        return list(ends.values())

    def _chain(self, end: Value) -> list[Value]:
        """The values that ``end`` is a linear function of, in graph order, the root first."""
        chain = (value for value in self.found.families[end.root] if end.descends_from(value))
        return sorted(chain, key=lambda value: self.index[value.node])

    def _stream(self, end: Value) -> ResidualStream | None:
        root, *values = self._chain(end)
        steps = [value.step for value in values if value.step is not None]
        steps += self._trailing_steps(end, {step.node for step in steps})
        branches = self._branches(root.node, steps)
        if sum(bool(branch.adds) for branch in branches) < 2:
            return None
        last = max(self.index[branch.value] for branch in branches)
        owner, scope = _owner_and_scope([add.node for branch in branches for add in branch.adds])
        width = int(require_tensor(root.node).shape[-1])
        kept = tuple(step for step in steps if self.index[step.node] <= last)
        return ResidualStream(owner, scope, root.node, branches, width, kept)

    def _branches(self, root: Node, steps: Sequence[Step]) -> tuple[Branch, ...]:
        """The steps by the value that is read after them; those that change the root's part alone are in none."""
        on_stream = {step.node for step in steps}
        # A value's place in depth: the number of the last branch output in it, then its place in the graph.
        place, adds = {root: (0, self.index[root])}, 0
        for step in steps:
            adds += bool(step.outputs)
            for output in step.outputs:
                place.setdefault(output.node, (adds, self.index[output.node]))
            newest = adds if step.outputs else max(place[addend.node][0] for addend in step.values)
            place[step.node] = (newest, self.index[step.node])
        deep = [step for step in steps if place[step.node][0]]
        read = sorted((step.node for step in deep if reads_of(step.node, on_stream)), key=place.__getitem__)
        ends = [place[value] for value in read]
        branches: list[list[Step]] = [[] for _ in read]
        for step in deep:
            if (k := bisect.bisect_left(ends, place[step.node])) < len(read):
                branches[k].append(step)
        return tuple(Branch(value, tuple(own)) for value, own in zip(read, branches, strict=True))

    def _trailing_steps(self, last: Value, on_stream: set[Node]) -> list[Step]:
        """What is linear after the last sum, which the last read sees as earlier reads see theirs."""
        steps: list[Step] = []
        node = last.node
        while True:
            reads = reads_of(node, on_stream)
            found = self._step_from(node, reads[0]) if len(reads) == 1 else None
            if found is None or not self.found.is_independent([found], last.root):
                return steps
            node = reads[0]
            steps.append(found)

    def _step_from(self, value: Node, node: Node) -> Step | None:
        """The step from ``value`` to ``node``, which is no sum of two values."""
        known = self.values.get(node)
        step = known.step if known is not None and not known.is_sum else linear_step(node)
        return step if step is not None and step.values[0].node is value else None

    def pieces(self, streams: list[ResidualStream]) -> list[Piece]:
        """The streams, and the chains that are neither a part of one nor nested in a branch of one."""
        pieces = []
        for stream in streams:
            adds = [step.node for step in stream.steps if step.outputs]
            values = [step.node for step in stream.steps]
            pieces.append(_piece(adds, stream.root, values, {stream.branches[-1].value, adds[-1]}, is_stream=True))
        families = {self.nesting.family_of(stream) for stream in streams}
        for end in self._ends():
            chain = end.root.node, end.node, end.depth
            if (
                end.root in families
                or not end.depth
                or any(self.nesting.is_nested(*chain, stream) for stream in streams)
            ):
                continue
            adds = [value.node for value in self._chain(end) if value.is_sum]
            if len(adds) == 1 and not self.nesting.adds_sublayer(adds[0]):
                # Arithmetic, as of positions and masks.
                continue
            pieces.append(_piece(adds, end.root.node, adds, {end.node}, is_stream=False))
        return pieces

    def all_rejected(self, streams: list[ResidualStream], pieces: list[Piece]) -> tuple[RejectedAdd, ...]:
        """Every sum that is on no stream, with the reason, in graph order."""
        reasons = dict(self.found.rejected)
        alone = set().union(*(piece.values for piece in pieces if not piece.is_stream))
        for node, value in self.values.items():
            if value.step is not None and is_sum(node):
                reasons[node] = "a chain of one add" if node in alone else "within a branch of a stream"
        on_stream = {step.node for stream in streams for step in stream.steps}
        return tuple(
            RejectedAdd(n, reasons[n]) for n in sorted(reasons, key=self.index.__getitem__) if n not in on_stream
        )


def _piece(adds: list[Node], root: Node, values: list[Node], ends: set[Node], *, is_stream: bool) -> Piece:
    first, last = module_path(adds[0]), module_path(adds[-1])
    return Piece(first, last, root, frozenset(values), frozenset(ends), is_stream)


def _owner_and_scope(adds: list[Node]) -> tuple[str, str]:
    """The deepest module that all of ``adds`` run in, and the deepest that is no ``nn.Sequential``."""
    stacks = zip(*(module_stack(add) for add in adds), strict=False)
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, stacks)]
    scope = common[-1] if common else ""
    sequential = sequential_paths(adds[0])
    while common and common[-1] in sequential:
        common.pop()
    return (common[-1] if common else ""), scope
