"""How the chains of adds of a graph lie to one another: one in a branch of the other, or beside it."""

from __future__ import annotations

import bisect
import itertools

from torch.fx import Node

from attnres_rewrite.graph.nodes import require_tensor, same_shape
from attnres_rewrite.passes.linear_values import LinearValues, Value
from attnres_rewrite.patterns.operators import is_mixer
from attnres_rewrite.streams import ResidualStream


class Nesting:
    """Questions about chains of adds, answered from the linear values of their graph."""

    def __init__(self, found: LinearValues) -> None:
        self.found, self.index, self.values = found, found.index, found.values

    def adds_sublayer(self, add: Node) -> bool:
        """Whether the branch that ``add`` adds is more than arithmetic, as in a rotary embedding."""
        value = self.values[add]
        start = self.index[value.root.node]
        outputs = value.step.outputs if value.step is not None else ()
        return any(self.found.depends_on(output.node, is_mixer, start, before=add) for output in outputs)

    def is_nested(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether the chain of adds from ``root`` to ``last`` is a part of what one branch of ``outer`` computes."""
        around = self._add_around(last, outer) if self.index[root] >= self.index[outer.root] else None
        if around is None or root is outer.root or not self.found.computes_from(root, self.family_of(outer)):
            return False
        return not self.is_coupled(root, last, adds, outer)

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

    def is_coupled(self, root: Node, last: Node, adds: int, outer: ResidualStream) -> bool:
        """Whether a chain that begins in a branch of ``outer`` goes on after it, as a second stream does.

        What one layer merely hands to a later one is no chain, and attention scores that are summed over the
        layers have another shape.
        """
        if adds < 2 or root is outer.root or not self.index[outer.root] < self.index[root] < self.index[last]:
            return False
        if not same_shape(require_tensor(root), require_tensor(outer.root)):
            return False
        begins = self._add_around(root, outer)
        if begins is None or not self.found.computes_from(root, self.family_of(outer)):
            return False
        read = next(branch.value for branch in outer.branches if any(s.node is begins for s in branch.steps))
        return self.index[last] > self.index[read]

    def family_of(self, stream: ResidualStream) -> Value:
        """The root of the family whose values make up ``stream``."""
        return self.values[stream.root]
