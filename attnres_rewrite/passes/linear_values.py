"""Which values of a graph are linear combinations of one root and what is added to it: the search of pass 4."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable

from torch.fx import GraphModule, Node

from attnres_rewrite.graph.memory import overwritten_by, writers_of
from attnres_rewrite.graph.nodes import (
    depends_on,
    indices,
    is_float_tensor,
    require_tensor,
    same_shape,
    tensor_of,
)
from attnres_rewrite.patterns import LinearSum, through_transparent
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.linear_step import linear_step
from attnres_rewrite.patterns.stream_scale import is_product, linear_source
from attnres_rewrite.patterns.summands import summands
from attnres_rewrite.streams import Addend, Step


@dataclasses.dataclass(eq=False)
class Value:
    """A value of a family: all the values that are linear combinations of one root and of branch outputs.

    Attributes:
        node: The node that computes it.
        step: How; ``None`` for a root.
        sources: The values that it is computed from.
        root: The root of the family, ``None`` for the root itself.
        depth: The largest number of branch outputs on a way from the root.
        ancestors: The values that it is a linear function of, itself among them, as bits by ``number``.
        number: Its place in the family.
    """

    node: Node
    step: Step | None
    sources: tuple[Value, ...]
    root_value: Value | None
    depth: int
    ancestors: int
    number: int

    @property
    def root(self) -> Value:
        """The first value of the family."""
        return self.root_value or self

    @property
    def is_sum(self) -> bool:
        """Whether it is the sum with a branch output, of two values of the family, or with what the root is made of."""
        return self.step is not None and self.step.kind in ("add", "link")

    def descends_from(self, other: Value) -> bool:
        """Whether it is a linear function of ``other``, or ``other`` itself."""
        return self.root is other.root and bool(self.ancestors >> other.number & 1)


class LinearValues:
    """The families of linear values of a graph, grown sum by sum in topological order.

    Attributes:
        index: The topological order.
        values: Every value that was found, by its node.
        families: For every root its values, in the order in which they were found.
        rejected: The sums that give no value, with the reason.
        shared: Sums that overwrite in place a tensor that something else shares.
        inside: For every sum, the values that its branch output computes from and that it is no function of.
    """

    def __init__(self, module: GraphModule) -> None:
        self.index = indices(module.graph)
        self.values: dict[Node, Value] = {}
        self.families: dict[Value, list[Value]] = {}
        self.rejected: dict[Node, str] = {}
        self.shared: list[Node] = []
        self.inside: dict[Value, set[Value]] = {}
        self._writers = writers_of(module.graph)
        # Where the sum is that is being considered; what is written into a tensor after it makes no difference to it.
        self._considered = len(self.index)
        self._sum = LinearSum()
        self._sums_of_root: dict[Value, frozenset[Node]] = {}
        # Branch outputs that were added, by the root of the family and by what they are without casts and views.
        self._outputs: dict[tuple[Value, Node], Value] = {}

    def consider(self, node: Node) -> None:
        """Extend or begin a family with the sum ``node``, or note why not."""
        self._considered = self.index[node]
        self._consider(node)
        self._considered = len(self.index)

    def _consider(self, node: Node) -> None:
        match = self._sum.match(node)
        if isinstance(match, Mismatch):
            if all(isinstance(operand, Node) and is_float_tensor(operand) for operand in node.args[:2]):
                self.rejected[node] = match.reason
            return
        shapes = [require_tensor(operand).shape for operand, _ in match.addends]
        if not same_shape(*(require_tensor(operand) for operand, _ in match.addends)):
            self.rejected[node] = "the operands differ in shape: " + " and ".join(str(list(shape)) for shape in shapes)
            return
        reasons = []
        # A value that is known to be on a stream goes before a new root, whichever operand it is, and a bias goes last.
        for attach, (side, other) in itertools.product(
            (self._extend, self._begin, self._add_bias), (match.addends, match.addends[::-1])
        ):
            outcome = attach(node, side, other)
            if isinstance(outcome, Value) and overwritten_by(node):
                self.shared.append(node)
                self.rejected[node] = "it overwrites a tensor that something else shares"
                self.inside.pop(self.values.pop(node), None)
            if isinstance(outcome, Value):
                return
            reasons.append(outcome)
        self.rejected[node] = next(
            (reason for reason in reasons if reason is not None), "neither operand computes from the other"
        )

    def depends_on(
        self,
        node: Node,
        is_value: Callable[[Node], bool],
        earliest: int,
        *,
        through: Callable[[Node], bool] = lambda _: True,
        before: Node | None = None,
    ) -> bool:
        """:func:`.graph.nodes.depends_on`, with what is written into tensors in place before a node is read.

        Args:
            node: Where the search starts.
            is_value: Which nodes are looked for.
            earliest: No such node has an index below this one.
            through: Which nodes the search goes on from.
            before: What reads ``node``; the sum that is being considered if it is not given.
        """
        limit = self.index[before] if before is not None else self._considered

        def written(tensor: Node) -> list[Node]:
            return [writer for writer in self._writers.get(tensor, ()) if self.index[writer] < limit]

        return depends_on(node, is_value, earliest, self.index, through=through, written=written)

    def computes_from(self, node: Node, root: Value, *, through: Callable[[Node], bool] = lambda _: True) -> bool:
        """Whether ``node`` computes, in whatever way, from a value of the family of ``root``."""

        def is_value(candidate: Node) -> bool:
            known = self.values.get(candidate)
            return candidate is root.node or (known is not None and known.root is root)

        return self.depends_on(node, is_value, self.index[root.node], through=through)

    def is_independent(self, steps: Iterable[Step], root: Value) -> bool:
        """Whether no scale or bias among ``steps`` computes from the family, as a gate does."""
        operands = [step.scale for step in steps if step.scale is not None]
        operands += [addend.node for step in steps for addend in step.addends if addend.kind != "value"]
        return not any(self.computes_from(operand, root) for operand in operands)

    def _extend(self, node: Node, side: tuple[Node, float], other: tuple[Node, float]) -> Value | str | None:
        """The sum of a known value behind ``side`` and of another one, a branch output, or what the root is made of."""
        base, steps = self._origins(side[0])[-1]
        value = self.values.get(base)
        if value is None or not self.is_independent(steps, value.root):
            return None
        if (link := self._way_to(other[0], value.root)) is not None:
            operand = Addend("value", self._along(*link).node, other[1])
            return self._sum_of(node, (value, steps, side[1]), operand, set())
        if linear_source(other[0]) is base:
            return "both operands are one value"
        if not self.computes_from(other[0], value.root):
            is_in_root = self._is_in_root(other[0], value.root)
            return self._sum_of(node, (value, steps, side[1]), Addend("root", *other), set()) if is_in_root else None
        if self._is_gated(other[0], value):
            # No branch output: what was the stream so far would be lost inside it.
            return "the other operand is a later value of the stream, gated"
        inside = self._inside_branch(other[0], value)
        if value.step is not None and value.step.kind == "link" and not all(v.descends_from(value) for v in inside):
            return "the other operand computes from values of the stream that lie beside this one"
        return self._sum_of(node, (value, steps, side[1]), Addend("branch", *other), inside)

    def _begin(self, node: Node, side: tuple[Node, float], other: tuple[Node, float]) -> Value | str | None:
        """The sum of a new root behind ``side``, the nearest, and of what computes from it; else the reason."""
        for base, steps in self._origins(side[0]):
            if base in self.values:
                return None
            if linear_source(other[0]) is base:
                return "both operands are one value"
            root = Value(base, None, (), None, 0, 1, 0)
            # What is merely looked up by an index that computes from it, as a vector quantiser does, begins no stream.
            if self.computes_from(other[0], root, through=_is_no_index) and self.is_independent(steps, root):
                return self._sum_of(node, (root, steps, side[1]), Addend("branch", *other), set())
        return None

    def _add_bias(self, node: Node, side: tuple[Node, float], other: tuple[Node, float]) -> Value | str | None:
        """The sum of a known value behind ``side`` and of what computes from no stream at all."""
        base, steps = self._origins(side[0])[-1]
        value = self.values.get(base)
        if value is None or not self.is_independent(steps, value.root):
            return None
        # What computes from a stream, this one or another, is no bias but a meeting of two.
        if self.depends_on(other[0], self.values.__contains__, 0):
            return None
        return self._sum_of(node, (value, steps, side[1]), Addend("bias", *other), set())

    def _sum_of(
        self, node: Node, stream: tuple[Value, tuple[Step, ...], float], operand: Addend, inside: set[Value]
    ) -> Value:
        base, steps, factor = stream
        if base.node not in self.values:
            self.values[base.node], self.families[base] = base, [base]
        source = self._along(base, steps)
        value = self._new(Step(node, (Addend("value", source.node, factor), operand)), base.root)
        if operand.kind == "branch":
            self.inside[value] = inside
            # From now on it is a term of the stream, which may be linked on as a value is.
            family = self.families[base.root]
            output = Value(operand.node, None, (), base.root, 0, 1 << len(family), len(family))
            family.append(output)
            self._outputs.setdefault((base.root, through_transparent(operand.node)), output)
        return value

    def _along(self, value: Value, steps: Iterable[Step]) -> Value:
        """The last of the values that lead from ``value`` by ``steps``, which become values of the family."""
        for step in steps:
            value = self.values[step.node] if step.node in self.values else self._new(step, value.root)
        return value

    def _new(self, step: Step, root: Value) -> Value:
        number = len(self.families[root])
        sources = tuple(self._source(addend.node, root) for addend in step.values)
        ancestors = functools.reduce(operator.or_, (source.ancestors for source in sources), 1 << number)
        depth = max(source.depth for source in sources) + bool(step.outputs)
        value = self.values[step.node] = Value(step.node, step, sources, root, depth, ancestors, number)
        self.families[root].append(value)
        return value

    def _source(self, node: Node, root: Value) -> Value:
        return self.values.get(node) or self._outputs[root, through_transparent(node)]

    def _origins(self, node: Node) -> list[tuple[Node, tuple[Step, ...]]]:
        """Candidates for the stream value behind ``node``, with the steps in between; nearest first."""
        steps: tuple[Step, ...] = ()
        origins = []
        while True:
            node = through_transparent(node)
            origins.append((node, steps))
            found = () if node in self.values else self._steps_to(node)
            if not found:
                return origins
            steps = (*found, *steps)
            node = found[0].addends[0].node

    def _steps_to(self, node: Node) -> tuple[Step, ...]:
        """The step by which ``node`` is a function of one other tensor, or the steps where it is a sum of two of it."""
        if (step := linear_step(node)) is not None:
            return (step,)
        match = self._sum.match(node)
        if isinstance(match, Mismatch):
            return ()
        (left, left_base), (right, right_base) = (self._scales_to(operand) for operand, _ in match.addends)
        # x - c * x, which is (1 - c) * x.
        if left_base is not right_base:
            return ()
        summed = (Addend("value", through_transparent(operand), factor) for operand, factor in match.addends)
        return (*left, *right, Step(node, tuple(summed)))

    def _scales_to(self, node: Node) -> tuple[list[Step], Node]:
        """The scales that lead to ``node``, and what they begin with."""
        steps: list[Step] = []
        node = through_transparent(node)
        while node not in self.values and (step := linear_step(node)) is not None:
            steps.insert(0, step)
            node = step.addends[0].node
        return steps, node

    def _way_to(self, node: Node, root: Value) -> tuple[Value, tuple[Step, ...]] | None:
        """What ``node`` is but for scales, and these, if it is a value or a branch output of the family of ``root``."""
        for base, steps in self._origins(node):
            known = self.values.get(base)
            value = self._outputs.get((root, base)) if known is None or known.root is not root else known
            if value is None or not self.is_independent(steps, root):
                continue
            if steps and value.node is not base:
                # A branch output is known by the cast or view of it that was added.
                first, *rest = steps
                scaled = (Addend("value", value.node, first.addends[0].factor), *first.addends[1:])
                steps = (dataclasses.replace(first, addends=scaled), *rest)
            return value, steps
        return None

    def _is_gated(self, node: Node, value: Value) -> bool:
        """Whether ``node`` is a product with a value of the family of ``value`` that this is no function of."""
        pending = [node]
        while pending:
            factor = through_transparent(pending.pop())
            known = self.values.get(factor)
            if known is not None and known.root is value.root:
                if not value.descends_from(known):
                    return True
            elif is_product(factor):
                pending += [operand for operand in factor.args if isinstance(operand, Node)]
        return False

    def _is_in_root(self, node: Node, root: Value) -> bool:
        """Whether ``node`` is a sum of what the root is a sum of, as an embedding is that is mixed back in."""
        if root not in self._sums_of_root:
            self._sums_of_root[root] = summands(root.node, self.depends_on, self.index)
        return not summands(node, self.depends_on, self.index).isdisjoint(self._sums_of_root[root])

    def _inside_branch(self, branch: Node, value: Value) -> set[Value]:
        """The values of the family that ``branch`` computes from and that ``value`` is no function of.

        They belong to the inside of the branch, however long a chain they make.
        """
        inside = set()

        def is_ancestor(candidate: Node) -> bool:
            known = self.values.get(candidate)
            if known is None or known.root is not value.root:
                return False
            if not value.descends_from(known):
                inside.add(known)
            return value.descends_from(known)

        self.depends_on(branch, is_ancestor, self.index[value.root.node])
        return inside


def _is_no_index(node: Node) -> bool:
    """Whether ``node`` is anything but a tensor of integers or truth values."""
    value = tensor_of(node)
    return value is None or value.is_floating_point() or value.is_complex()
