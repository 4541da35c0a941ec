"""Pass 6: the rewritten graph says what the equation says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.graph import op_name
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.insert_attnres import Site
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
        for k, (site, count) in enumerate(zip(sites, plan.sources, strict=True)):
            self._check_site(site, k, count, plan, terms)
        return len(sites)

    def summary(self, result: int) -> str:
        """Counts for the log."""
        return f"{result} sites checked"

    def _terms(self, plan: StreamPlan) -> dict[Node, set[int]]:
        """Which branch outputs a node is, by number from 1; 0 is the root."""
        terms: dict[Node, set[int]] = {plan.stream.root: {0}}
        for k, branch in enumerate(plan.stream.branches, start=1):
            for add in branch.adds:
                assert isinstance(add.operand, Node)
                terms.setdefault(through_transparent(add.operand), set()).add(k)
        return terms

    def _check_site(self, site: Site, k: int, count: int, plan: StreamPlan, terms: dict[Node, set[int]]) -> None:
        if site.node.target is not torch.ops.attnres.block_attn_res.default:
            raise PostconditionError(f"site {k} is not a block_attn_res node but {site.node.target}")
        sources = site.node.args[0]
        assert isinstance(sources, (list, tuple))
        if len(sources) != count:
            raise PostconditionError(f"site {k} has {len(sources)} sources instead of {count}")
        parts = [self._expand(source, terms) for source in sources if isinstance(source, Node)]
        if tuple(tuple(sorted(p)) for p in parts) != site.parts:
            raise PostconditionError(f"site {k} sums {parts} instead of {site.parts}")
        if sum(map(len, parts)) != k + 2 or set().union(*parts) != set(range(k + 2)):
            raise PostconditionError(f"the sources of site {k} are not disjoint sums of f_0 to f_{k + 1}: {parts}")

    def _expand(self, source: Node, terms: dict[Node, set[int]]) -> set[int]:
        found: set[int] = set()
        pending = [source]
        while pending:
            node = pending.pop()
            base = through_transparent(node)
            if base in terms:
                found |= terms[base]
            elif op_name(base) == "add":
                pending.extend(n for n in base.args[:2] if isinstance(n, Node))
            elif op_name(base) in ("mul", "div", "view_as"):
                pending.append(base.args[0])  # type: ignore[arg-type]
            else:
                raise PostconditionError(f"source {source.name} sums {base.name}, which is no branch output")
        return found
