"""Pass 3: which adds make up a residual stream."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

from torch.fx import GraphModule, Node

from attnres_rewrite.errors import AttnResError, NoResidualStreamError, UnsupportedResidualError
from attnres_rewrite.graph import (
    SHAPE_ONLY,
    carries_data,
    depends_on,
    indices,
    is_float_tensor,
    module_path,
    module_stack,
    op_name,
    require_tensor,
    same_shape,
    sequential_paths,
    source_line,
)
from attnres_rewrite.memory import aliases_of, overwritten_by
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.patterns import ResidualAdd, StreamBias, StreamScale, Transparent, through_transparent
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.refusal import REVERSIBLE, Piece, explain_refusals, is_mixer
from attnres_rewrite.patterns.residual_add import is_add
from attnres_rewrite.patterns.stream_scale import scaled_values
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


@dataclasses.dataclass(eq=False)
class _Value:
    """A stream value: the steps that lead to it from ``previous``, ``None`` for a root."""

    node: Node
    previous: _Value | None = None
    steps: tuple[Step, ...] = ()

    @functools.cached_property
    def root(self) -> _Value:
        return self.previous.root if self.previous is not None else self

    @functools.cached_property
    def depth(self) -> int:
        return self.previous.depth + 1 if self.previous is not None else 0

    def path(self) -> list[_Value]:
        values, value = [], self
        while value is not None:
            values.append(value)
            value = value.previous  # type: ignore[assignment]
        return values[::-1]


class FindStreams(Pass):
    """Find every chain ``x_{k+1} = x_k + f_k`` by data flow.

    An add extends a stream if exactly one operand is on it and the other depends, through tensor data,
    on an earlier value of that stream. An add of ``x`` and something that depends on ``x`` starts one.
    Forks make a tree; the stream is its longest path. A chain that begins and ends inside one branch
    of another stream is nested, and no stream of its own.
    """

    def call(self, module: GraphModule) -> StreamAnalysis:
        """The streams of ``module``, which is not changed."""
        search = _Search(module)
        for node in module.graph.nodes:
            if is_add(node):
                search.consider(node)
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
        steps = [step.node for stream in result.streams for branch in stream.branches for step in branch.steps]
        if len(steps) != len(set(steps)):
            raise PostconditionError("one add was found on two streams")

    def summary(self, result: StreamAnalysis) -> str:
        """Counts for the log."""
        branches = [len(stream.branches) for stream in result.streams]
        return f"{len(result.streams)} streams with {branches} branches, {len(result.rejected)} adds rejected"


class _Search:
    """The tree of stream values, grown add by add in topological order."""

    def __init__(self, module: GraphModule) -> None:
        self.index = indices(module.graph)
        self.values: dict[Node, _Value] = {}
        self.rejected: dict[Node, str] = {}
        self._inside: dict[_Value, set[_Value]] = {}
        self._shared: list[Node] = []
        self._add, self._scale, self._bias = ResidualAdd(), StreamScale(), StreamBias()

    def consider(self, node: Node) -> None:
        """Extend or start a stream with the add ``node``, or note why not."""
        match = self._add.match(node)
        if isinstance(match, Rejection):
            if all(isinstance(operand, Node) and is_float_tensor(operand) for operand in node.args[:2]):
                self.rejected[node] = match.reason
            return
        sides = ((match.left, match.right, match.alpha), (match.right, match.left, 1.0))
        reasons = []
        for stream_side, branch, alpha in sides:
            if stream_side is match.right and match.alpha != 1.0:
                reasons.append("the stream operand is multiplied by alpha")
                continue
            outcome = self._attach(node, stream_side, branch, alpha)
            if isinstance(outcome, _Value) and overwritten_by(node) is not None:
                self._shared.append(node)
                self.rejected[node] = "it overwrites a tensor that something else shares"
                return
            if isinstance(outcome, _Value):
                self.values[node] = outcome
                return
            reasons.append(outcome)
        self.rejected[node] = next((r for r in reasons if "both" in r), "neither operand computes from the other")

    def _attach(self, node: Node, stream_side: Node, branch: Node, alpha: float) -> _Value | str:
        add = Step("add", node, branch, alpha)
        origins = self._origins(stream_side)
        # A value that is known to be on a stream goes before a new root nearer by.
        for base, steps in sorted(origins, key=lambda origin: origin[0] not in self.values):
            value = self.values.get(base) or _Value(base)
            other = self.values.get(through_transparent(branch))
            if other is not None and other.root is value.root:
                return "both operands are on the stream"
            if not self._computes_from(branch, value.root):
                continue
            if not self._independent(steps, value.root):
                continue
            if _linear_source(branch) is base:
                return "both operands are on the stream"
            self.values.setdefault(base, value)
            new = _Value(node, value, (*steps, add))
            self._inside[new] = self._inside_branch(branch, value)
            return new
        return "the other operand does not compute from it"

    def _independent(self, steps: Iterable[Step], root: _Value) -> bool:
        """Whether no scale or bias among ``steps`` computes from the stream, as a gate does."""
        return not any(isinstance(step.operand, Node) and self._computes_from(step.operand, root) for step in steps)

    def _computes_from(self, node: Node, root: _Value) -> bool:
        def is_value(candidate: Node) -> bool:
            known = self.values.get(candidate)
            return candidate is root.node or (known is not None and known.root is root)

        return depends_on(node, is_value, self.index[root.node], self.index)

    def _inside_branch(self, branch: Node, value: _Value) -> set[_Value]:
        """The values of the tree off the path to ``value`` that its new branch computes from.

        They belong to the inside of the branch, however long a chain they make.
        """
        inside = set()

        def is_on_path(candidate: Node) -> bool:
            known = self.values.get(candidate)
            if known is None or known.root is not value.root:
                return False
            ancestor = value
            while ancestor.previous is not None and ancestor.depth > known.depth:
                ancestor = ancestor.previous
            if ancestor is not known:
                inside.add(known)
            return ancestor is known

        depends_on(branch, is_on_path, self.index[value.root.node], self.index)
        return inside

    def _origins(self, node: Node) -> list[tuple[Node, tuple[Step, ...]]]:
        """Candidates for the stream value behind ``node``, with the steps in between; nearest first."""
        steps: tuple[Step, ...] = ()
        origins = []
        while True:
            node = through_transparent(node)
            origins.append((node, steps))
            found = self._linear_step(node) if node not in self.values else None
            if found is None:
                return origins
            step, node = found
            steps = (step, *steps)

    def _linear_step(self, node: Node) -> tuple[Step, Node] | None:
        """The scale or bias that ``node`` applies, and what it applies it to."""
        scale = self._scale.match(node)
        if not isinstance(scale, Rejection):
            return Step("scale", node, scale.factor), scale.source
        bias = self._bias.match(node)
        if not isinstance(bias, Rejection):
            return Step("bias", node, bias.bias), bias.source
        add = self._add.match(node)
        if isinstance(add, Rejection) or add.alpha != 1.0:
            return None
        # Of two operands of one shape the stream is the one that is known to be on one.
        known = [through_transparent(operand) in self.values for operand in (add.left, add.right)]
        if known[0] == known[1]:
            return None
        source, operand = (add.left, add.right) if known[0] else (add.right, add.left)
        # What computes from a stream, this one or another, is no bias but a meeting of two.
        if depends_on(operand, self.values.__contains__, 0, self.index):
            return None
        return Step("bias", node, operand), source

    def streams(self) -> list[ResidualStream]:
        """The longest path of every tree, without trees that are nested in a branch of another."""
        found = [s for end in self._ends() if (s := self._stream(end.path())) is not None]
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

    def _ends(self) -> list[_Value]:
        """The last value of the longest path of every tree, without the values that are inside a branch."""
        extended = {value.previous for value in self.values.values()}
        consumed: set[_Value] = set()
        for value, inside in self._inside.items():
            # A skip from the root around the whole stream, with which it ends, takes nothing away from it.
            if value.previous is not value.root or value in extended:
                consumed |= inside
        ends: dict[_Value, _Value] = {}
        for value in self.values.values():
            # Of two paths of one length the later one wins: it may compute from the other.
            if value not in consumed and value.depth >= ends.get(value.root, value.root).depth:
                ends[value.root] = value
        return [end for end in ends.values() if end.previous is not None]

    def all_rejected(self, streams: list[ResidualStream], pieces: list[Piece]) -> tuple[Rejected, ...]:
        """Every add that is on no stream, with the reason, in graph order."""
        reasons = dict(self.rejected)
        alone = set().union(*(piece.values for piece in pieces if not piece.is_stream))
        for value in self.values.values():
            if value.previous is not None:
                reasons[value.node] = "a chain of one add" if value.node in alone else "within a branch of a stream"
        on_stream = {step.node for stream in streams for branch in stream.branches for step in branch.steps}
        return tuple(Rejected(n, reasons[n]) for n in sorted(reasons, key=self.index.__getitem__) if n not in on_stream)

    def refusals(self, streams: list[ResidualStream], pieces: list[Piece]) -> list[Refusal]:
        """Why streams, or parts of some, are missing from ``streams``."""
        certain = [
            Rejection(
                "a residual add overwrites in place a tensor that is used elsewhere as well: write x = x + f(x)", add
            )
            for add in self._shared
        ]
        certain += [Rejection(OVERWRITTEN, node) for stream in streams for node in self._overwriting(stream)]
        found = explain_refusals(pieces, list(self.rejected), self.index)
        found += [Rejection(REVERSIBLE, root) for root in self._coupled(streams, pieces)]
        return [
            Refusal(module_path(r.node), UnsupportedResidualError(f"{r.reason} (at {source_line(r.node)})"))
            for r in (*certain, *found)
        ]

    def _overwriting(self, stream: ResidualStream) -> Iterator[Node]:
        """What changes, in place, a part of a stream value that the next step still adds to, or a term of its sums."""
        steps = [step for branch in stream.branches for step in branch.steps]
        index, forever = self.index, len(self.index)
        kept = [(stream.root, index[steps[0].node], forever)]
        kept += [
            (s.operand, index[s.node], forever) for s in steps if isinstance(s.operand, Node) and s.kind != "scale"
        ]
        for step, following in itertools.pairwise(steps):
            kept.append((step.node, index[step.node], index[following.node]))
            side = next((n for n in following.node.all_input_nodes if through_transparent(n) is step.node), step.node)
            kept.append((side, index[step.node], index[following.node]))
        own = {step.node for step in steps}
        for node, start, stop in kept:
            aliases = aliases_of(node)
            users = (user for alias in aliases for user in alias.users if user not in own)
            yield from (user for user in users if overwritten_by(user) in aliases and start < index[user] < stop)

    def adds_sublayer(self, add: Node) -> bool:
        """Whether the branch that ``add`` adds is more than arithmetic, as in a rotary embedding."""
        value = self.values[add]
        start = self.index[value.root.node]
        return any(
            depends_on(step.operand, is_mixer, start, self.index)
            for step in value.steps
            if step.kind == "add" and isinstance(step.operand, Node)
        )

    def pieces(self, streams: list[ResidualStream]) -> list[Piece]:
        """The streams, and the chains that are neither a part of one nor nested in a branch of one."""
        pieces = []
        for stream in streams:
            values = [step.node for branch in stream.branches for step in branch.steps]
            last = stream.branches[-1]
            adds = [
                stream.branches[0].adds[0].node,
                *(branch.adds[-1].node for branch in stream.branches if branch.adds),
            ]
            pieces.append(_piece(adds, stream.root, values, {last.value, adds[-1]}, is_stream=True))
        trees = {self._tree_of(stream) for stream in streams}
        for end in self._ends():
            chain = end.root.node, end.node, end.depth
            if end.root in trees or any(self._nested(*chain, stream) for stream in streams):
                continue
            adds = [value.node for value in end.path()[1:]]
            pieces.append(_piece(adds, end.root.node, adds, {end.node}, is_stream=False))
        return pieces

    def _stream(self, path: list[_Value]) -> ResidualStream | None:
        steps = [step for value in path for step in value.steps]
        steps += self._trailing_steps(path[-1], {step.node for step in steps})
        on_path = {step.node for step in steps}
        branches, pending = [], []
        for step in steps:
            pending.append(step)
            if reads_of(step.node, on_path):
                branches.append(Branch(tuple(pending)))
                pending = []
        root = path[0].node
        while branches and not branches[0].adds:
            # What is read scaled before the first add is where the stream begins.
            root = branches.pop(0).value
        if sum(bool(branch.adds) for branch in branches) < 2:
            return None
        owner, scope = _owner_and_scope([add.node for branch in branches for add in branch.adds])
        return ResidualStream(owner, scope, root, tuple(branches), int(require_tensor(root).shape[-1]))

    def _trailing_steps(self, last: _Value, on_path: set[Node]) -> list[Step]:
        """Scales and biases after the last add, which the last read sees as earlier reads see theirs."""
        steps: list[Step] = []
        node = last.node
        while True:
            reads = reads_of(node, on_path)
            found = self._linear_step(reads[0]) if len(reads) == 1 and reads[0] not in self.values else None
            if (
                found is None
                or through_transparent(found[1]) is not node
                or not self._independent(found[:1], last.root)
            ):
                return steps
            node = reads[0]
            steps.append(found[0])

    def _nested(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether the chain of adds from ``root`` to ``last`` is a part of what one branch of ``outer`` computes."""
        branch = self._branch_around(last, outer) if self.index[root] >= self.index[outer.root] else None
        if branch is None or root is outer.root or not self._computes_from(root, self._tree_of(outer)):
            return False
        return not self._is_coupled(root, last, adds, outer)

    def _branch_around(self, node: Node, outer: ResidualStream) -> int | None:
        """The branch of ``outer`` that computes from ``node``, of those at its place in the graph."""
        # What can be told by position goes first: a search between chains far apart crosses the whole graph.
        index = self.index
        k = bisect.bisect_right(outer.branches, index[node], key=lambda branch: index[branch.value])
        adds = (s for branch in itertools.islice(outer.branches, k, None) for s in branch.adds)
        operand = next((s.operand for s in adds if index[s.node] > index[node]), None)
        found = isinstance(operand, Node) and depends_on(operand, lambda other: other is node, index[node], index)
        return k if found else None

    def _is_coupled(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether a chain that begins in a branch of ``outer`` goes on after it, as a second stream does.

        What one layer merely hands to a later one is no chain, and attention scores that are summed over the
        layers have another shape.
        """
        if adds < 2 or root is outer.root or not self.index[outer.root] < self.index[root] < self.index[last]:
            return False
        if not same_shape(require_tensor(root), require_tensor(outer.root)):
            return False
        begins = self._branch_around(root, outer)
        if begins is None or not self._computes_from(root, self._tree_of(outer)):
            return False
        return self.index[last] > self.index[outer.branches[begins].value]

    def _coupled(self, streams: list[ResidualStream], pieces: list[Piece]) -> Iterator[Node]:
        """The root of every chain that goes on from one branch of a stream to the next."""
        for piece, stream in itertools.product(pieces, streams):
            last = max(piece.ends, key=self.index.__getitem__)
            if self._is_coupled(piece.root, last, len(piece.values), stream):
                yield piece.root

    def _tree_of(self, stream: ResidualStream) -> _Value:
        return self.values[stream.branches[0].adds[0].node].root


def _linear_source(node: Node) -> Node:
    """What ``node`` is by nothing but scales, copies and a stop of gradients."""
    while True:
        *_, node = scaled_values(node)
        if op_name(node) != "detach" or not isinstance(node.args[0], Node):
            return node
        node = node.args[0]


def _piece(adds: list[Node], root: Node, values: list[Node], ends: set[Node], *, is_stream: bool) -> Piece:
    first, last = module_path(adds[0]), module_path(adds[-1])
    return Piece(first, last, root, frozenset(values), frozenset(ends), is_stream)


def reads_of(value: Node, on_path: set[Node]) -> list[Node]:
    """The nodes that read the stream value, directly or behind transparent operations."""
    pattern, reads, pending, seen = Transparent(), [], [value], {value}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or user in on_path:
                continue
            seen.add(user)
            if isinstance(pattern.match(user), Node):
                pending.append(user)
            elif carries_data(user) and op_name(user) not in SHAPE_ONLY:
                reads.append(user)
    return reads


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
