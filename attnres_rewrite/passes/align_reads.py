"""Part of pass 14: reads of alike branches get one form, so that a body can hold the read with its branch."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.graph.nodes import GraphBuilder, indices, op_name, require_tensor
from attnres_rewrite.ops import attend_blocks_native
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.sections import nodes_between
from attnres_rewrite.patterns import Transparent
from attnres_rewrite.patterns.operators import is_dropout
from attnres_rewrite.streams import ResidualStream

aten, attnres = torch.ops.aten, torch.ops.attnres


@dataclasses.dataclass(eq=False)
class Span:
    """One branch of a stream, with the read before it and the sum after it.

    Attributes:
        read: What the branch reads: a site, a cast or view of one, or for the first branch the root.
        outputs: What the branch adds to the stream.
        site: The ``merge_partial`` node of the read; ``None`` for the root, and where the site is another operator.
        end: The source of later sites that the branch is the last term of.
        begins_block: Whether the read has no partial, so that ``end`` is the branch output itself.
    """

    read: Node
    outputs: tuple[Node, ...]
    site: Node | None
    end: Node
    begins_block: bool

    def branch(self, index: Mapping[Node, int]) -> list[Node]:
        """The nodes between the read and what the branch adds."""
        return nodes_between(self.read, self.outputs, index)

    def whole(self, index: Mapping[Node, int]) -> list[Node]:
        """The same with the site before and the sum after it; none where the site is not a node of its own."""
        if self.site is None:
            return []
        inside = nodes_between(self.site, [self.end], index)
        return [self.site, *inside] if inside and inside[-1] is self.end else []


def spans_of(stream: ResidualStream, sites: Sequence[Site]) -> list[Span]:
    """The branches of a rewritten stream, by depth."""
    root = _as_read(stream.root)
    nodes = [None, *(site.node if op_name(site.node) == "merge_partial" else None for site in sites)]
    spans = []
    for k, branch in enumerate(stream.branches):
        outputs = tuple(addend.node for step in branch.steps for addend in step.outputs)
        read = sites[k - 1].read if k else root
        begins = k == 0 or not sites[k - 1].has_partial
        spans.append(Span(read, outputs, nodes[k], sites[k].sources[-1], begins))
    return spans


def _as_read(root: Node) -> Node:
    """What the first layer reads: the root behind a dropout that is off. Models set up what layers share after it."""
    passed_on = [user for user in root.users if is_dropout(user) and Transparent().match(user) is root]
    return passed_on[0] if len(passed_on) == 1 else root


class ReadAligner:
    """Gives the reads of one stream one form, with values that change no number.

    ::

        mixed          ► merge_partial ► branch ► f              mixed, zeros   ► merge_partial ► branch ► (+) zeros
        mixed, partial ► merge_partial ► branch ► (+) partial    mixed, partial ► merge_partial ► branch ► (+) partial
        root                           ► branch ► f              root, zeros    ► merge_partial ► branch ► (+) zeros

    Args:
        module: Whose graph is edited.
        sites: Of the stream, all in two phases.
    """

    def __init__(self, module: GraphModule, sites: Sequence[Site]) -> None:
        self.graph, self.build = module.graph, GraphBuilder(module)
        self.first = sites[0].node
        # Ends of spans, and what is a source in the place of each.
        self.moved: dict[Node, Node] = {}
        self._nothing: tuple[Node, Node] | None = None
        self._factors: dict[float, Node] = {}

    def align(self, spans: Iterable[Span]) -> None:
        """Edit the reads and ends of ``spans``, whose branches are alike."""
        spans = list(spans)
        for span in spans:
            if span.site is None:
                self._insert_merge(span)
        spans = [span for span in spans if span.site is not None]
        whole = any(not span.begins_block for span in spans)
        totals = {span.site.args[7] for span in spans if span.site is not None}
        for span in spans:
            assert span.site is not None
            if whole and span.begins_block:
                self._add_nothing(span)
            self._copy_log_sum(span.site)
            if totals != {1.0}:
                self._multiply(span)

    def _insert_merge(self, span: Span) -> None:
        """A site of one source for the first read, with the query of the second, which then gets zeros from it."""
        index = indices(self.graph)
        readers = [node for node in span.branch(index) if span.read in node.all_input_nodes]
        _, _, _, query, gain, eps, scale, _ = self.first.args
        if any(isinstance(node, Node) and index[node] > index[readers[0]] for node in (query, gain)):
            return
        _, infinite = self._no_partial(before=readers[0])
        with self.graph.inserting_before(readers[0]):
            given = (span.read, infinite, None, query, gain, eps, scale, 1.0)
            merge = self.build.call(attnres.merge_partial.default, *given, like=self.first)
        inside = set(readers)
        span.read.replace_all_uses_with(merge, delete_user_cb=lambda user: user in inside)
        span.site = span.read = merge

    def _no_partial(self, before: Node | None = None) -> tuple[Node, Node]:
        """Zeros for a partial and infinity for a log-sum, where they are used first."""
        if self._nothing is None:
            attend = _phase_one_of(self.first)
            blocks: Any = attend.args[0]
            given = (blocks[0], self.first.args[3])
            with self.graph.inserting_before(before or attend):
                both = self.build.call(attnres.no_partial.default, *given, like=self.first)
                items = [self.build.call(operator.getitem, both, i, like=self.first) for i in range(2)]
            self._nothing = items[0], items[1]
        return self._nothing

    def _add_nothing(self, span: Span) -> None:
        zeros, infinite = self._no_partial()
        assert span.site is not None
        mixed, _, _, *rest = span.site.args
        span.site.args = (mixed, infinite, zeros, *rest)
        end = span.end
        with self.graph.inserting_after(end):
            total = self.build.call(aten.add.Tensor, zeros, end, like=end)
        end.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        self.moved[end] = span.end = total

    def _copy_log_sum(self, site: Node) -> None:
        """A log-sum of its own: of an expanded ``attend_blocks`` it is a part of a tensor of all reads of the block."""
        log_sum = site.args[1]
        assert isinstance(log_sum, Node)
        if op_name(log_sum.all_input_nodes[0]) == "attend_blocks":
            with self.graph.inserting_before(site):
                site.update_arg(1, self.build.call(aten.clone.default, log_sum, like=site))

    def _multiply(self, span: Span) -> None:
        """Multiply after the site by a tensor, which an operand may be, what it multiplies by a number."""
        site = span.site
        assert site is not None
        total: Any = site.args[7]
        site.update_arg(7, 1.0)
        with self.graph.inserting_after(site):
            product = self.build.call(aten.mul.Tensor, site, self._factor(total), like=site)
        site.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
        span.read = product if span.read is site else span.read

    def _factor(self, total: float) -> Node:
        if total not in self._factors:
            root = self._no_partial()[0]
            with self.graph.inserting_after(root):
                self._factors[total] = self.build.call(aten.new_full.default, root, [], total, like=self.first)
        return self._factors[total]


def can_align(sites: Sequence[Site]) -> bool:
    """Whether all sites are in two phases, on sources of one form, outside of checkpointed regions."""
    # What is after the eighth argument says another form than the paper's, which stays between the calls.
    if not sites or any(op_name(site.node) != "merge_partial" or len(site.node.args) > 8 for site in sites):
        return False
    kinds = {(require_tensor(node).dtype, str(require_tensor(node).shape)) for site in sites for node in site.sources}
    tagged = any("ac_graph_id" in site.node.meta or "recompute" in site.node.meta for site in sites)
    # Without an epsilon, zeros have no norm.
    eps: Any = sites[0].node.args[5]
    return len(kinds) == 1 and not tagged and bool(eps > 0)


def call_phase_one(sites: Sequence[Site]) -> int:
    """Let one compiled function be phase one of ``sites`` for all numbers of blocks, where there is one.

    Returns:
        How many nodes were changed.
    """
    changed = 0
    for node in dict.fromkeys(_phase_one_of(site.node) for site in sites):
        blocks: Any = node.args[0]
        if attend_blocks_native.takes([require_tensor(block) for block in blocks]):
            node.target = attnres.attend_blocks_native.default
            changed += 1
    return changed


def _phase_one_of(site: Node) -> Node:
    """The node that computes the mixed of a site."""
    return site.all_input_nodes[0].all_input_nodes[0]
