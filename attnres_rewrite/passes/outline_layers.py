"""Pass 14: branches that are computed alike are compiled once."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Graph, GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.graph.nodes import indices
from attnres_rewrite.passes.base import Pass, PostconditionError, require_order
from attnres_rewrite.passes.bodies import Body
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.sections import Section, modes, nodes_between, wants_gradients, why_it_stays
from attnres_rewrite.patterns import Transparent
from attnres_rewrite.patterns.operators import is_dropout
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

        read ─► norm ─► attention ─► f            read ─► invoke_subgraph(body) ─► f
        read'─► norm'─► attention'─► f'    to     read'─► invoke_subgraph(body) ─► f'

    A layer of attention and an MLP is two branches, so a model of alike layers has two bodies, whatever its blocks are:
    sites and sums, which differ from layer to layer, stay between the calls. The values that a branch computes with are
    the operands; two branches are alike if they have the same operators, with the same arguments, on values of the same
    dtypes, shapes and strides.

    A branch stays as it is, with the reason in the log, if it is alone; or if running it elsewhere, or differentiating
    it once for all calls, might give other numbers: where it writes into memory, draws random numbers, changes a mode,
    returns a view of what it is given, or is checkpointed.
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
        wanted, inline = wants_gradients(module.graph), list[tuple[str, str]]()
        alike: dict[object, list[Section]] = {}
        for name, section in _sections(module.graph, streams):
            if (reason := why_it_stays(section)) is not None:
                inline.append((name, reason))
                continue
            # A body is differentiated once, for the operands that want gradients in the call that is traced.
            flags = tuple(wanted[node] for node in section.operands)
            alike.setdefault((section.structure, flags), []).append(section)
        calls: list[int] = []
        replaced: dict[Node, Node] = {}
        for sections in alike.values():
            reason = _outline(module, sections, f"{BODY}_{len(calls)}", replaced)
            if reason is None:
                calls.append(len(sections))
            else:
                inline += [(section.nodes[-1].name, reason) for section in sections]
        _sort(module.graph)
        module.graph.lint()
        module.recompile()
        return Outlined(tuple(calls), tuple(inline), replaced)

    def ensures(self, module: GraphModule, result: Outlined, *inputs: object) -> None:
        """As many bodies and calls as the result says, and no call is given one value twice."""
        calls = [node for node in module.graph.nodes if node.target is _compat.invoke_subgraph()]
        own = [node for node in calls if str(node.args[1]).startswith(BODY)]
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


def _sections(graph: Graph, streams: Sequence[tuple[ResidualStream, Sequence[Site]]]) -> Iterator[tuple[str, Section]]:
    """The sections of all streams in graph order, each with the name of the branch output."""
    index, mode_of, taken = indices(graph), dict(modes(graph)), set[Node]()
    for stream, sites in streams:
        reads = [_as_read(stream.root), *(site.read for site in sites)]
        for read, branch in zip(reads, stream.branches, strict=False):
            ends = [addend.node for step in branch.steps for addend in step.outputs]
            nodes = nodes_between(read, ends, index)
            if nodes and taken.isdisjoint(nodes):
                taken.update(nodes)
                yield nodes[-1].name, Section.of(nodes, mode_of[nodes[0]])


def _as_read(root: Node) -> Node:
    """What the first layer reads: the root behind a dropout that is off. Models set up what layers share after it."""
    passed_on = [user for user in root.users if is_dropout(user) and Transparent().match(user) is root]
    return passed_on[0] if len(passed_on) == 1 else root


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
