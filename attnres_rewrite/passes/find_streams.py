"""Pass 3: which adds make up a residual stream."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.errors import AttnResError, NoResidualStreamError, UnsupportedResidualError
from attnres_rewrite.graph import (
    module_path,
    module_stack,
    require_tensor,
    same_shape,
    sequential_paths,
    source_line,
)
from attnres_rewrite.memory import aliases_of, overwritten_by
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.linear_values import LinearValues, Value
from attnres_rewrite.patterns import reads_of, through_transparent
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.linear_sum import is_sum
from attnres_rewrite.patterns.refusal import REVERSIBLE, Piece, explain_refusals, is_mixer
from attnres_rewrite.streams import Branch, Rejected, ResidualStream, Step

OVERWRITTEN = (
    "a part of the residual stream is overwritten in place between two of its adds, so it is not a sum of branch "
    "outputs and Attention Residuals are not defined for it"
)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Something that must not be rewritten.

    Attributes:
        module: Path of the module where it was found.
        error: What to tell the user.
    """

    module: str
    error: AttnResError


@dataclasses.dataclass(frozen=True)
class StreamAnalysis:
    """What :class:`FindStreams` found.

    Attributes:
        streams: Every residual stream, in graph order.
        rejected: Every add that was considered and is on no stream, with the reason.
        refusals: Why the graph cannot be rewritten, with the module where: there is no stream, or not all of one
            was found.
        lone: Adds ``x + f(x)`` of a sublayer that are on no stream: in a part of a model, a part of one.
    """

    streams: tuple[ResidualStream, ...]
    rejected: tuple[Rejected, ...]
    refusals: tuple[Refusal, ...] = ()
    lone: tuple[Node, ...] = ()

    @property
    def refusal(self) -> AttnResError | None:
        """The first refusal, if there is one."""
        return self.refusals[0].error if self.refusals else None


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
        refusals = search.refusals(streams, pieces)
        if not refusals and not streams:
            refusals = [Refusal("", _no_stream(rejected))]
        lone = (end for piece in pieces if not piece.is_stream for end in piece.ends if search.adds_sublayer(end))
        return StreamAnalysis(tuple(streams), rejected, tuple(refusals), tuple(lone))

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
            if not any(self._nested(stream.root, last, adds, other) for other in around):
                streams.append(stream)
            around.append(stream)
        return streams

    def _ends(self) -> list[Value]:
        """The deepest value of every family, without the values that are inside a branch."""
        extended = {source for value in self.values.values() for source in value.sources}
        consumed: set[Value] = set()
        for value, inside in self.found.inside.items():
            # A skip from the root around the whole stream, with which it ends, takes nothing away from it.
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
        step = known.step if known is not None and not known.is_sum else self.found.linear_step(node)
        return step if step is not None and step.values[0].node is value else None

    def pieces(self, streams: list[ResidualStream]) -> list[Piece]:
        """The streams, and the chains that are neither a part of one nor nested in a branch of one."""
        pieces = []
        for stream in streams:
            adds = [step.node for step in stream.steps if step.outputs]
            values = [step.node for step in stream.steps]
            pieces.append(_piece(adds, stream.root, values, {stream.branches[-1].value, adds[-1]}, is_stream=True))
        families = {self._family_of(stream) for stream in streams}
        for end in self._ends():
            chain = end.root.node, end.node, end.depth
            if end.root in families or not end.depth or any(self._nested(*chain, stream) for stream in streams):
                continue
            adds = [value.node for value in self._chain(end) if value.is_sum]
            if len(adds) == 1 and not self.adds_sublayer(adds[0]):
                # Arithmetic, as of positions and masks.
                continue
            pieces.append(_piece(adds, end.root.node, adds, {end.node}, is_stream=False))
        return pieces

    def all_rejected(self, streams: list[ResidualStream], pieces: list[Piece]) -> tuple[Rejected, ...]:
        """Every sum that is on no stream, with the reason, in graph order."""
        reasons = dict(self.found.rejected)
        alone = set().union(*(piece.values for piece in pieces if not piece.is_stream))
        for node, value in self.values.items():
            if value.step is not None and is_sum(node):
                reasons[node] = "a chain of one add" if node in alone else "within a branch of a stream"
        on_stream = {step.node for stream in streams for step in stream.steps}
        return tuple(Rejected(n, reasons[n]) for n in sorted(reasons, key=self.index.__getitem__) if n not in on_stream)

    def refusals(self, streams: list[ResidualStream], pieces: list[Piece]) -> list[Refusal]:
        """Why streams, or parts of some, are missing from ``streams``."""
        certain = [
            Rejection(
                "a residual add overwrites in place a tensor that is used elsewhere as well: write x = x + f(x)", add
            )
            for add in self.found.shared
        ]
        certain += [Rejection(OVERWRITTEN, node) for stream in streams for node in self._overwriting(stream)]
        # To a chain of adds that is a branch of a gated stream, that one looks like a bias.
        steps = (value.step for value in self.values.values() if value.step is not None)
        biased = [step.node for step in steps if any(addend.kind == "bias" for addend in step.addends)]
        found = explain_refusals(pieces, [*self.found.rejected, *biased], self.index)
        found += [Rejection(REVERSIBLE, root) for root in self._coupled(streams, pieces)]
        return [
            Refusal(module_path(r.node), UnsupportedResidualError(f"{r.reason} (at {source_line(r.node)})"))
            for r in (*certain, *found)
        ]

    def _overwriting(self, stream: ResidualStream) -> Iterator[Node]:
        """What changes, in place, a part of a stream value that a later step still needs, or a term of its sums."""
        index, forever = self.index, len(self.index)
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
            yield from (user for user in users if overwritten_by(user) in aliases and start < index[user] < stop)

    def adds_sublayer(self, add: Node) -> bool:
        """Whether the branch that ``add`` adds is more than arithmetic, as in a rotary embedding."""
        value = self.values[add]
        start = self.index[value.root.node]
        outputs = value.step.outputs if value.step is not None else ()
        return any(self.found.depends_on(output.node, is_mixer, start, before=add) for output in outputs)

    def _nested(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether the chain of adds from ``root`` to ``last`` is a part of what one branch of ``outer`` computes."""
        around = self._add_around(last, outer) if self.index[root] >= self.index[outer.root] else None
        if around is None or root is outer.root or not self.found.computes_from(root, self._family_of(outer)):
            return False
        return not self._is_coupled(root, last, adds, outer)

    def _add_around(self, node: Node, outer: ResidualStream) -> Node | None:
        """The next add of ``outer``, if what it adds computes from ``node``."""
        # What can be told by position goes first: a search between chains far apart crosses the whole graph.
        index = self.index
        k = bisect.bisect_right(outer.steps, index[node], key=lambda step: index[step.node])
        step = next((step for step in itertools.islice(outer.steps, k, None) if step.outputs), None)
        if step is None:
            return None
        found = any(
            self.found.depends_on(o.node, lambda n: n is node, index[node], before=step.node) for o in step.outputs
        )
        return step.node if found else None

    def _is_coupled(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether a chain that begins in a branch of ``outer`` goes on after it, as a second stream does.

        What one layer merely hands to a later one is no chain, and attention scores that are summed over the
        layers have another shape.
        """
        if adds < 2 or root is outer.root or not self.index[outer.root] < self.index[root] < self.index[last]:
            return False
        if not same_shape(require_tensor(root), require_tensor(outer.root)):
            return False
        begins = self._add_around(root, outer)
        if begins is None or not self.found.computes_from(root, self._family_of(outer)):
            return False
        read = next(branch.value for branch in outer.branches if any(s.node is begins for s in branch.steps))
        return self.index[last] > self.index[read]

    def _coupled(self, streams: list[ResidualStream], pieces: list[Piece]) -> Iterator[Node]:
        """The root of every chain that goes on from one branch of a stream to the next."""
        for piece, stream in itertools.product(pieces, streams):
            last = max(piece.ends, key=self.index.__getitem__)
            if self._is_coupled(piece.root, last, len(piece.values), stream):
                yield piece.root

    def _family_of(self, stream: ResidualStream) -> Value:
        return self.values[stream.root]


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


def _no_stream(rejected: tuple[Rejected, ...]) -> NoResidualStreamError:
    return NoResidualStreamError(
        "no residual stream was found: no chain of adds x = x + f(x) runs over at least two sublayers."
        + ("" if rejected else " The traced graph adds no two tensors.")
    )
