"""Pass 14: branches that are computed alike are compiled once."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

from torch.fx import Graph, GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.graph.nodes import indices
from attnres_rewrite.passes.align_reads import ReadAligner, Span, call_phase_one, can_align, spans_of
from attnres_rewrite.passes.base import Pass, PostconditionError, require_order
from attnres_rewrite.passes.bodies import Body
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.sections import Section, modes, wants_gradients, why_it_stays
from attnres_rewrite.passes.shared_masks import share_masks
from attnres_rewrite.streams import ResidualStream

# What the names of all bodies begin with; compilers add to it.
BODY = "attnres_body"


@dataclasses.dataclass(frozen=True)
class Outlined:
    """What became of the branches of a graph.

    Attributes:
        calls: For every body, how many branches call it.
        inline: For every branch that stays as it is: its name and the reason.
        replaced: For the nodes of outlined branches that are used outside: what is used instead.
    """

    calls: tuple[int, ...]
    inline: tuple[tuple[str, str], ...]
    replaced: Mapping[Node, Node]

    def updated(self, site: Site) -> Site:
        """``site`` with the sources that it has now."""
        sources = tuple(self.replaced.get(source, source) for source in site.sources)
        return dataclasses.replace(site, sources=sources)


class OutlineLayers(Pass):
    """Make of the branches of equal structure calls of one graph, which AOTAutograd and Inductor compile once.

    ::

        merge_partial ─► norm ─► attention ─► (+)           invoke_subgraph(body)
        merge_partial'─► norm'─► attention'─► (+)'    to    invoke_subgraph(body)

    A layer of attention and an MLP is two branches, so a model of alike layers has two bodies, whatever its blocks are.
    The values that a branch computes with are the operands; two branches are alike if they have the same operators,
    with the same arguments, on values of the same dtypes, shapes and strides.

    Where the sites are in two phases, a body holds the second one too, and the sum that the branch joins:
    :mod:`align_reads` gives them one form. The first phase, which differs in its number of blocks, stays between the
    calls, on a CPU as one function for all numbers. Read by read, sites and sums stay between the calls. What attention
    makes of a mask is made once, before them (:mod:`shared_masks`).

    A branch stays as it is, with the reason in the log, if it is alone; or if running it elsewhere, or differentiating
    it once for all calls, might give other numbers: where it writes into memory that others have too, draws random
    numbers, changes a mode, returns a view of what it is given, or is checkpointed.
    """

    def requires(self, module: GraphModule, *inputs: object) -> None:
        """The graph is in order, and torch has the operator."""
        require_order(module)
        if _compat.invoke_subgraph() is None:
            raise UnsupportedResidualError(
                'this release of torch has no invoke_subgraph: leave compile_layers at "inline", or upgrade torch'
            )

    def call(self, module: GraphModule, streams: Sequence[tuple[ResidualStream, Sequence[Site]]]) -> Outlined:
        """Outline, in place, the branches of all rewritten streams of a graph, each given with its sites."""
        share_masks(module)
        outliner, moved = _Outliner(module), dict[Node, Node]()
        spans = list[Span]()
        for stream, sites in streams:
            own = spans_of(stream, sites)
            moved |= _align(module, own, sites)
            spans += own
        outliner.outline(spans, Span.whole)
        outliner.outline([span for span in spans if span not in outliner.done], Span.branch)
        module.graph.lint()
        module.recompile()
        replaced = {old: outliner.replaced.get(new, new) for old, new in moved.items()} | outliner.replaced
        return Outlined(tuple(outliner.calls), tuple(outliner.inline), replaced)

    def ensures(self, module: GraphModule, result: Outlined, *inputs: object) -> None:
        """As many bodies and calls as the result says, and no call is given one value twice."""
        own = [node for node in calls_in(module.graph) if _is_own(node)]
        found = [len(list(group)) for _, group in itertools.groupby(sorted(str(node.args[1]) for node in own))]
        if sorted(found) != sorted(result.calls):
            raise PostconditionError(f"bodies have {found} calls in the graph instead of {list(result.calls)}")
        for call in own:
            operands = call.args[2:]
            if len(set(operands)) < len(operands):
                raise PostconditionError(f"{call.name} is given one value for two operands: {operands}")

    def summary(self, result: Outlined) -> str:
        """Counts, and why branches stay inline."""
        reasons: dict[str, list[str]] = {}
        for name, reason in result.inline:
            reasons.setdefault(reason, []).append(name)
        inline = "".join(f"; {len(names)} inline ({names[0]}: {reason})" for reason, names in reasons.items())
        return f"{sum(result.calls)} branches call {len(result.calls)} bodies{inline}"


def calls_only_bodies(module: GraphModule) -> bool:
    """Whether every graph that is called in ``module``, itself or from within, is one that this pass has made."""
    graphs = (part.graph for part in module.modules() if isinstance(part, GraphModule))
    return all(map(_is_own, itertools.chain.from_iterable(map(calls_in, graphs))))


def calls_in(graph: Graph) -> list[Node]:
    """The calls of other graphs, in order."""
    called = _compat.invoke_subgraph()
    return [] if called is None else list(graph.find_nodes(op="call_function", target=called))


def _is_own(call: Node) -> bool:
    return str(call.args[1]).startswith(BODY)


def _align(module: GraphModule, spans: Sequence[Span], sites: Sequence[Site]) -> Mapping[Node, Node]:
    """Give the reads of alike branches one form; returns what was put in the place of sources."""
    aligned, moved = set[Span](), dict[Node, Node]()
    if can_align(sites):
        call_phase_one(sites)
        aligner = ReadAligner(module, sites)
        for group in _Outliner(module).groups(spans, Span.branch):
            if len(group) > 1 and Body([section for _, section in group]).why_it_stays() is None:
                aligned.update(span for span, _ in group)
                aligner.align([span for span, _ in group])
        moved = aligner.moved
    for span in spans:
        # Log-sums may be parts of one tensor, which the fake values do not say: a read that was not aligned stays out.
        span.site = span.site if span in aligned else None
    return moved


class _Outliner:
    """Makes calls of what is computed alike.

    Attributes:
        calls: For every body, how many spans call it.
        inline: For every span that stays as it is: its name and the reason, as of the last attempt.
        replaced: For the nodes of outlined spans that are used outside: what is used instead.
        done: The spans that are calls.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.calls: list[int] = []
        self.inline: list[tuple[str, str]] = []
        self.replaced: dict[Node, Node] = {}
        self.done: list[Span] = []

    def outline(self, spans: Sequence[Span], nodes_of: Callable[[Span, Mapping[Node, int]], list[Node]]) -> None:
        """Make calls of what ``nodes_of`` says of every span, where two are alike."""
        self.inline.clear()
        for group in self.groups(spans, nodes_of):
            sections = [section for _, section in group]
            name = f"{BODY}_{len(self.calls)}"
            if (reason := _outline(self.module, sections, name, self.replaced)) is None:
                self.calls.append(len(sections))
                self.done += [span for span, _ in group]
            else:
                self.inline += [(section.nodes[-1].name, reason) for section in sections]
        _sort(self.module.graph)

    def groups(
        self, spans: Sequence[Span], nodes_of: Callable[[Span, Mapping[Node, int]], list[Node]]
    ) -> list[list[tuple[Span, Section]]]:
        """The spans with their sections, those together that can share a body; what may not move is left out."""
        graph, taken = self.module.graph, set[Node]()
        index, mode_of, wanted = indices(graph), dict(modes(graph)), wants_gradients(graph)
        alike: dict[object, list[tuple[Span, Section]]] = {}
        for span in spans:
            nodes = nodes_of(span, index)
            if not nodes or not taken.isdisjoint(nodes):
                continue
            taken.update(nodes)
            section = Section.of(nodes, mode_of[nodes[0]])
            if (reason := why_it_stays(section, index)) is not None:
                self.inline.append((nodes[-1].name, reason))
                continue
            # A body is differentiated once, for the operands that want gradients in the call that is traced.
            flags = tuple(wanted[node] for node in section.operands)
            alike.setdefault((section.structure, flags), []).append((span, section))
        return list(alike.values())


def _outline(module: GraphModule, sections: Sequence[Section], name: str, replaced: dict[Node, Node]) -> str | None:
    """Make ``sections`` calls of one body; why not, if they stay as they are."""
    if len(sections) < 2:
        return "no other branch is computed like it"
    body = Body(sections)
    reason = body.why_it_stays()
    if reason is None:
        module.add_submodule(name, GraphModule({}, body.graph))
        body.call_from(module, name, replaced)
    return reason


def _sort(graph: Graph) -> None:
    """Put the nodes in topological order, otherwise as they are: what reads a call comes after it."""
    index = indices(graph)
    waits = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(i, node) for node, i in index.items() if not waits[node]]
    order: list[Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, (index[user], user))
    for before, after in itertools.pairwise(order):
        if before.next is not after:
            before.append(after)
