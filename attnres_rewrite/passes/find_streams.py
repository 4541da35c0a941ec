"""Pass 3: which adds make up a residual stream."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from torch.fx import GraphModule, Node

from attnres_rewrite.errors import AttnResError, NoResidualStreamError, UnsupportedResidualError
from attnres_rewrite.graph import (
    SHAPE_ONLY,
    carries_data,
    depends_on,
    indices,
    is_float_tensor,
    module_stack,
    op_name,
    require_tensor,
    sequential_paths,
    source_line,
)
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.patterns import ResidualAdd, StreamScale, Transparent, through_transparent
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.refusal import explain_interruption, explain_refusal
from attnres_rewrite.patterns.residual_add import is_add, is_in_place
from attnres_rewrite.streams import Branch, Rejected, ResidualStream, Step


@dataclasses.dataclass(frozen=True)
class StreamAnalysis:
    """What :class:`FindStreams` found.

    Attributes:
        streams: Every residual stream, in graph order.
        rejected: Every add that was considered and is on no stream, with the reason.
        refusal: Why the graph cannot be rewritten: there is no stream, or not all of one was found.
    """

    streams: tuple[ResidualStream, ...]
    rejected: tuple[Rejected, ...]
    refusal: AttnResError | None = None


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
        on_stream = {step.node for stream in streams for branch in stream.branches for step in branch.steps}
        rejected = tuple(Rejected(n, reason) for n, reason in search.rejected.items() if n not in on_stream)
        refusal: AttnResError | None = search.refusal(streams)
        if refusal is None and not streams:
            refusal = _refusal(search, rejected)
        return StreamAnalysis(tuple(streams), rejected, refusal)

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
        self._consumed: set[_Value] = set()
        self._shared: list[Node] = []
        self._add, self._scale = ResidualAdd(), StreamScale()

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
            if isinstance(outcome, _Value) and is_in_place(node):
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
        for base, scales in sorted(origins, key=lambda origin: origin[0] not in self.values):
            value = self.values.get(base) or _Value(base)
            other = self.values.get(through_transparent(branch))
            if other is not None and other.root is value.root:
                return "both operands are on the stream"
            if not self._computes_from(branch, value.root):
                continue
            if any(isinstance(s.operand, Node) and self._computes_from(s.operand, value.root) for s in scales):
                continue
            self.values.setdefault(base, value)
            self._mark_consumed(branch, value)
            return _Value(node, value, (*scales, add))
        return "the other operand does not compute from it"

    def _computes_from(self, node: Node, root: _Value) -> bool:
        def is_value(candidate: Node) -> bool:
            known = self.values.get(candidate)
            return candidate is root.node or (known is not None and known.root is root)

        return depends_on(node, is_value, self.index[root.node], self.index)

    def _mark_consumed(self, branch: Node, value: _Value) -> None:
        """Note the values of the tree off the path to ``value`` that its new branch computes from.

        They belong to the inside of the branch, however long a chain they make. Only a skip from the very
        root, around the whole stream, takes nothing away from it.
        """
        if value.previous is None:
            return

        def is_on_path(candidate: Node) -> bool:
            known = self.values.get(candidate)
            if known is None or known.root is not value.root:
                return False
            ancestor = value
            while ancestor.previous is not None and ancestor.depth > known.depth:
                ancestor = ancestor.previous
            if ancestor is not known:
                self._consumed.add(known)
            return ancestor is known

        depends_on(branch, is_on_path, self.index[value.root.node], self.index)

    def _origins(self, node: Node) -> list[tuple[Node, tuple[Step, ...]]]:
        """Candidates for the stream value behind ``node``, with the scales in between; nearest first."""
        scales: tuple[Step, ...] = ()
        origins = []
        while True:
            node = through_transparent(node)
            origins.append((node, scales))
            if node in self.values or isinstance(match := self._scale.match(node), Rejection):
                return origins
            scales = (Step("scale", node, match.factor), *scales)
            node = match.source

    def streams(self) -> list[ResidualStream]:
        """The longest path of every tree, without trees that are nested in a branch of another."""
        ends: dict[_Value, _Value] = {}
        for value in self.values.values():
            if value in self._consumed:
                continue
            # Of two paths of one length the later one wins: it may compute from the other.
            if value.depth >= ends.get(value.root, value.root).depth:
                ends[value.root] = value
        streams = [s for end in ends.values() if (s := self._stream(end.path())) is not None]
        streams = [s for s in streams if not any(self._nested(s, other) for other in streams if other is not s)]
        return sorted(streams, key=lambda s: self.index[s.root])

    def refusal(self, streams: list[ResidualStream]) -> UnsupportedResidualError | None:
        """Why a part of a stream is missing from ``streams``, if one is."""
        if self._shared:
            return UnsupportedResidualError(
                f"a residual add overwrites in place a tensor that is used elsewhere as well (at "
                f"{source_line(self._shared[0])}): write x = x + f(x) there"
            )
        for stream in streams:
            ends = {s.branches[-1].value for s in streams if s is not stream and _are_one_stack(s.owner, stream.owner)}
            found = explain_interruption(stream.root, ends, self.index)
            if found is not None:
                return UnsupportedResidualError(f"{found.reason} (at {source_line(found.node)})")
        return None

    def chains(self) -> list[list[_Value]]:
        """All root-to-leaf paths, however short, for explaining a refusal."""
        parents = {value.previous for value in self.values.values()}
        return [value.path() for value in self.values.values() if value not in parents and value.previous]

    def _stream(self, path: list[_Value]) -> ResidualStream | None:
        on_path = {step.node for value in path for step in value.steps}
        branches, pending = [], []
        for value in path[1:]:
            for step in value.steps:
                pending.append(step)
                if reads_of(step.node, on_path):
                    branches.append(Branch(tuple(pending)))
                    pending = []
        # A scale needs an add to belong to: scales that are read before the first add stay outside.
        if len(branches) < 2 or not all(branch.adds for branch in branches):
            return None
        root = require_tensor(path[0].node)
        owner, scope = _owner_and_scope([add.node for branch in branches for add in branch.adds])
        return ResidualStream(owner, scope, path[0].node, tuple(branches), int(root.shape[-1]))

    def _nested(self, inner: ResidualStream, outer: ResidualStream) -> bool:
        last, index = inner.branches[-1].value, self.index
        if not self._computes_from(inner.root, self.values[outer.root]):
            return False
        following = [s for b in outer.branches for s in b.adds if self.index[s.node] > self.index[last]]
        operand = following[0].operand if following else None
        return isinstance(operand, Node) and depends_on(operand, lambda node: node is last, index[last], index)


def _are_one_stack(owner: str, other: str) -> bool:
    """Whether two owners are one module, or layers of one list."""
    (parent, _, leaf), (other_parent, _, other_leaf) = owner.rpartition("."), other.rpartition(".")
    return owner == other or (parent == other_parent and leaf.isdigit() and other_leaf.isdigit())


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


def _refusal(search: _Search, rejected: tuple[Rejected, ...]) -> AttnResError:
    chains = [[step.node for value in path for step in value.steps] for path in search.chains()]
    roots = [path[0].node for path in search.chains()]
    found = explain_refusal(roots, chains, [r.node for r in rejected], search.index)
    if found is not None:
        return UnsupportedResidualError(f"{found.reason} (at {source_line(found.node)})")
    seen = "".join(f"\n  - {source_line(r.node)}: {r.reason}" for r in rejected[:8])
    return NoResidualStreamError(
        "no residual stream was found: no chain of adds x = x + f(x) runs over at least two sublayers. "
        + (f"Adds that were considered:{seen}" if seen else "The traced graph adds no two tensors.")
    )
