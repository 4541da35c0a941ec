"""Pass 13: the rewritten graph says what the equation says."""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Callable, Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.graph.nodes import op_name
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.schedule_reads import sources_of
from attnres_rewrite.patterns import LinearSum, StreamScale, through_transparent
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.streams import StreamPlan

# Of a sum of some hundred products of some hundred numbers, rounded twice in another order.
_TOLERANCE = 1e-9


class Expansion:
    """Reads off a graph what its nodes are as linear combinations of the terms of a stream.

    Every term and every coefficient stands for a random number, so that two nodes have one number only if they are the
    same combination, with the same coefficients. Made before the rewrite, it holds the old values of the stream.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self._random = random.Random(0)
        self._numbers: dict[Node, float] = {}
        self._terms: dict[Node, tuple[int, float]] = {}
        self.parts: list[int] = [0] * (plan.blocks + 1)
        self._add_term(plan.stream.root, {0})
        parts_of: dict[Node, set[int]] = {}
        for step in plan.stream.steps:
            for addend in step.addends:
                if addend.kind != "value":
                    parts_of.setdefault(through_transparent(addend.node), set()).add(plan.part_of(step, addend))
        for node, parts in parts_of.items():
            self._add_term(node, parts)
        self.old = [self.of(branch.value) for branch in plan.stream.branches]

    def _add_term(self, node: Node, parts: set[int]) -> None:
        # A bias that is added in several blocks is a term of each, and cannot tell them apart.
        bit = 1 << len(self._terms) if len(parts) == 1 else 0
        self._terms.setdefault(node, (bit, self._random.uniform(0.5, 1.5)))
        for part in parts:
            self.parts[part] |= bit

    def of(self, node: Node) -> tuple[int, float]:
        """The terms that ``node`` sums, as bits, and its number. What is found on the way is kept."""
        found, pending = self._terms, [node]
        while pending:
            base = through_transparent(pending[-1])
            if base in found:
                found[pending.pop()] = found[base]
                continue
            summed = _summands(base)
            if summed is None:
                raise PostconditionError(f"{node.name} sums {base.name}, which is no term of the stream")
            if missing := [n for n, _ in summed if n not in found]:
                pending.extend(missing)
                continue
            bits = functools.reduce(operator.or_, (found[n][0] for n, _ in summed))
            found[base] = bits, sum(found[n][1] * self._number(factor) for n, factor in summed)
        return found[node]

    def _number(self, factor: Node | float | tuple[Node, int]) -> float:
        """The number that a coefficient stands for, or one over it."""
        if isinstance(factor, tuple):
            return 1.0 / self._number(factor[0])
        if not isinstance(factor, Node):
            return float(factor)
        factor = through_transparent(factor)
        pending = [factor]
        while pending:
            node = pending[-1]
            if node in self._numbers:
                pending.pop()
                continue
            operation = None if node.kwargs else _ARITHMETIC.get(op_name(node))
            if operation is None:
                self._numbers[node] = self._random.uniform(0.9, 1.1)
                continue
            operands = [through_transparent(a) if isinstance(a, Node) else a for a in node.args]
            if missing := [n for n in operands if isinstance(n, Node) and n not in self._numbers]:
                pending.extend(missing)
                continue
            values = [self._numbers[n] if isinstance(n, Node) else float(n) for n in operands]  # type: ignore[arg-type]
            self._numbers[node] = operation(*values)
        return self._numbers[factor]


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "mul": operator.mul,
    "add": operator.add,
    "div": operator.truediv,
    "reciprocal": lambda x: 1.0 / x,
}


def _summands(node: Node) -> list[tuple[Node, Node | float | tuple[Node, int]]] | None:
    """What ``node`` sums, each with its factor; a factor that is divided by comes in a tuple."""
    if op_name(node) in ("view_as", "expand_as") and isinstance(node.args[0], Node):
        return [(node.args[0], 1.0)]
    match = LinearSum().match(node)
    if not isinstance(match, Mismatch):
        return list(match.addends)
    scale = StreamScale().match(node)
    if isinstance(scale, Mismatch):
        return None
    if scale.divides:
        assert isinstance(scale.factor, Node)
        return [(scale.source, (scale.factor, -1))]
    return [(scale.source, scale.factor)]


class CheckRewrite(Pass):
    """Re-derive, from the edges of the edited graph, what every site attends over.

    A site must see disjoint parts, each of the terms of one block, and their total must be the old stream value: the
    same terms with the same coefficients, as they were read off the graph before it was edited. No node may read the
    old stream any more. A failure is a bug here, reported before anything runs.
    """

    def call(self, module: GraphModule, plan: StreamPlan, sites: Sequence[Site], before: Expansion) -> int:
        """Check the sites of one stream; returns how many there are."""
        nodes = set(module.graph.nodes)
        steps = (step for branch in plan.stream.branches for step in branch.steps)
        if left := [step.node.name for step in steps if step.node in nodes]:
            raise PostconditionError(f"old adds are left in the graph: {left}")
        if len(sites) != len(plan.stream.branches):
            raise PostconditionError(f"{len(plan.stream.branches)} branches but {len(sites)} sites")
        for k, (site, count) in enumerate(zip(sites, plan.sources, strict=True)):
            _check_site(site, k, count, before)
        return len(sites)

    def summary(self, result: int) -> str:
        """Counts for the log."""
        return f"{result} sites checked"


def _check_site(site: Site, k: int, count: int, before: Expansion) -> None:
    sources = sources_of(site.node)
    if len(sources) != count:
        raise PostconditionError(f"site {k} has {len(sources)} sources instead of {count}")
    found = [before.of(source) for source in sources]
    terms, total = before.old[k]
    expected = [terms & before.parts[part] for part in site.parts]
    if [bits for bits, _ in found] != expected:
        numbers = [_numbers(bits) for bits, _ in found]
        raise PostconditionError(f"site {k} sums {numbers} instead of {list(map(_numbers, expected))}")
    # Disjoint and complete: as many bits as the old value has, and every one of them.
    if sum(bits.bit_count() for bits, _ in found) != terms.bit_count():
        raise PostconditionError(f"the sources of site {k} are not disjoint sums of the terms of the old value")
    size = sum(abs(number) for _, number in found)
    if not math.isclose(sum(number for _, number in found), total, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * size):
        raise PostconditionError(f"the sources of site {k} have other coefficients than the old value")


def _numbers(bits: int) -> set[int]:
    return {k for k in range(bits.bit_length()) if bits >> k & 1}
