"""Pass 7: the rewritten graph says what the equation says."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.graph import op_name
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.schedule_reads import sources_of
from attnres_rewrite.patterns import through_transparent
from attnres_rewrite.streams import StreamPlan


class CheckRewrite(Pass):
    """Re-derive, from the edges of the edited graph, what every site attends over.

    Site k must see disjoint sums whose total is the old stream value ``b_0 + f_1 + ... + f_k``, in the
    number that the plan says, and no node may read the old stream any more. A failure is a bug here,
    reported before anything runs.
    """

    def call(self, module: GraphModule, plan: StreamPlan, sites: Sequence[Site]) -> int:
        """Check the sites of one stream; returns how many there are."""
        nodes = set(module.graph.nodes)
        for branch in plan.stream.branches:
            left = [step.node.name for step in branch.steps if step.node in nodes]
            if left:
                raise PostconditionError(f"old adds are left in the graph: {left}")
        if len(sites) != len(plan.stream.branches):
            raise PostconditionError(f"{len(plan.stream.branches)} branches but {len(sites)} sites")
        terms = self._terms(plan)
        # How many branch outputs there are up to every site.
        added = itertools.accumulate(bool(branch.adds) for branch in plan.stream.branches)
        for k, (site, count, last) in enumerate(zip(sites, plan.sources, added, strict=True)):
            self._check_site(site, k, count, last, terms)
        return len(sites)

    def summary(self, result: int) -> str:
        """Counts for the log."""
        return f"{result} sites checked"

    def _terms(self, plan: StreamPlan) -> dict[Node, int]:
        """Which terms a node is, as a set of bits: bit k for branch output k, bit 0 for the root, none for a bias."""
        terms: dict[Node, int] = {plan.stream.root: 1}
        for k, branch in enumerate((b for b in plan.stream.branches if b.adds), start=1):
            for add in branch.adds:
                assert isinstance(add.operand, Node)
                operand = through_transparent(add.operand)
                terms[operand] = terms.get(operand, 0) | 1 << k
        for step in (step for branch in plan.stream.branches for step in branch.steps):
            if step.kind == "bias" and isinstance(step.operand, Node):
                terms.setdefault(through_transparent(step.operand), 0)
        return terms

    def _check_site(self, site: Site, k: int, count: int, last: int, terms: dict[Node, int]) -> None:
        sources = sources_of(site.node)
        if len(sources) != count:
            raise PostconditionError(f"site {k} has {len(sources)} sources instead of {count}")
        parts = [self._expand(source, terms) for source in sources]
        if parts != [_bits(part) for part in site.parts]:
            raise PostconditionError(f"site {k} sums {list(map(_numbers, parts))} instead of {site.parts}")
        # Disjoint and complete: as many bits as there are terms so far, and every one of them.
        count_of_bits, union = sum(part.bit_count() for part in parts), functools.reduce(operator.or_, parts)
        if count_of_bits != last + 1 or union != _bits(range(last + 1)):
            raise PostconditionError(
                f"the sources of site {k} are not disjoint sums of f_0 to f_{last}: {list(map(_numbers, parts))}"
            )

    def _expand(self, source: Node, terms: dict[Node, int]) -> int:
        """The terms that ``source`` sums; what is found on the way is kept in ``terms``, so no node is met twice."""
        pending = [source]
        while pending:
            base = through_transparent(pending[-1])
            if base in terms:
                terms[pending.pop()] = terms[base]
                continue
            if op_name(base) == "add":
                summed = [n for n in base.args[:2] if isinstance(n, Node)]
            elif op_name(base) in ("mul", "div", "view_as", "expand_as"):
                summed = [base.args[0]]  # type: ignore[list-item]
            else:
                raise PostconditionError(f"source {source.name} sums {base.name}, which is no branch output")
            if missing := [n for n in summed if n not in terms]:
                pending.extend(missing)
            else:
                terms[base] = functools.reduce(operator.or_, (terms[n] for n in summed))
        return terms[source]


def _bits(part: range) -> int:
    return (1 << part.stop) - (1 << part.start)


def _numbers(bits: int) -> set[int]:
    return {k for k in range(bits.bit_length()) if bits >> k & 1}
