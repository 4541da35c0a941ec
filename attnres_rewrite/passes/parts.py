"""The parts of stream values while they are written: tensors, and what they are multiplied by, kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.fx import Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import GraphBuilder, require_tensor, same_shape

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """A number times a tensor of at most one dimension, if there is one."""

    number: float = 1.0
    tensor: Node | None = None

    @property
    def is_one(self) -> bool:
        """Whether it changes nothing."""
        return self.number == 1.0 and self.tensor is None


@dataclasses.dataclass(eq=False)
class Part:
    """The root's share of a stream value, or that of one block: a linear combination of tensors.

    Values share parts, so one that was written is not written again.

    Attributes:
        terms: The tensors, each with its coefficient.
    """

    terms: Mapping[Node, Coefficient]


class PartWriter:
    """Arithmetic of parts, which writes to the graph only what cannot be kept as a coefficient.

    A stream that is scaled in every layer would else cost a pass over every source in every layer. So coefficients
    are multiplied and added among themselves, which takes numbers or tensors ``[]``, ``[1]`` or ``[D]``, and reach a
    source where it is read.

    Args:
        build: Writes nodes at the insertion point of its graph.
        root: A tensor of the shape that all parts have.
    """

    def __init__(self, build: GraphBuilder, root: Node) -> None:
        self.build, self.root = build, root
        self._products: dict[tuple[Node, Coefficient], Node] = {}
        self._factors: dict[tuple[object, ...], Node] = {}

    def term(self, node: Node) -> Part:
        """The part that is ``node``."""
        return Part({node: Coefficient()})

    def scaled(self, part: Part, number: float) -> Part:
        """``number`` times ``part``."""
        if number == 1.0:
            return part
        return Part({node: dataclasses.replace(c, number=number * c.number) for node, c in part.terms.items()})

    def scaled_by(self, part: Part, factor: Node, *, divides: bool, like: Node) -> Part:
        """``part`` times or divided by a tensor of at most one dimension."""
        terms = {}
        for node, c in part.terms.items():
            if c.tensor is not None or divides:
                given = 1.0 if c.tensor is None else c.tensor
                factor_now = self._factor(aten.div.Tensor if divides else aten.mul.Tensor, given, factor, like)
            else:
                factor_now = factor
            terms[node] = Coefficient(c.number, factor_now)
        return Part(terms)

    def total(self, left: Part, right: Part, *, like: Node) -> Part:
        """The sum of two parts."""
        terms = dict(left.terms)
        for node, c in right.terms.items():
            terms[node] = self._sum(terms[node], c, like) if node in terms else c
        return Part(terms)

    def tensor(self, part: Part, *, like: Node) -> Node:
        """The node that computes ``part``, of the shape of the root."""
        node = None
        for term, coefficient in part.terms.items():
            product = self._product(term, coefficient, like)
            node = product if node is None else self.build.call(aten.add.Tensor, node, product, like=like)
        assert node is not None
        if not same_shape(require_tensor(node), require_tensor(self.root)):
            node = self.build.call(aten.expand_as.default, node, self.root, like=like)
        if len(part.terms) > 1:
            # What comes after adds to the sum, as the running sum of a plain stream does.
            part.terms = {node: Coefficient()}
        return node

    def _product(self, node: Node, coefficient: Coefficient, like: Node) -> Node:
        if coefficient.is_one:
            return node
        if (node, coefficient) not in self._products:
            factor = self._whole(coefficient, like)
            self._products[node, coefficient] = self.build.call(aten.mul.Tensor, node, factor, like=like)
        return self._products[node, coefficient]

    def _whole(self, coefficient: Coefficient, like: Node) -> Node | float:
        if coefficient.tensor is None or coefficient.number == 1.0:
            return coefficient.number if coefficient.tensor is None else coefficient.tensor
        return self._factor(aten.mul.Tensor, coefficient.tensor, coefficient.number, like)

    def _sum(self, left: Coefficient, right: Coefficient, like: Node) -> Coefficient:
        if left.tensor is right.tensor:
            return Coefficient(left.number + right.number, left.tensor)
        first, second = self._whole(left, like), self._whole(right, like)
        if not isinstance(first, Node):
            first, second = second, first
        assert isinstance(first, Node)
        return Coefficient(1.0, self._factor(aten.add.Tensor, first, second, like))

    def _factor(self, op: _compat.Overload, left: Node | float, right: Node | float, like: Node) -> Node:
        """``op`` of two coefficients, which the parts of a value have in common."""
        key = (op, left, right)
        if key not in self._factors:
            if not isinstance(left, Node):
                assert op is aten.div.Tensor
                assert isinstance(right, Node)
                self._factors[key] = self.build.call(aten.reciprocal.default, right, like=like)
            else:
                self._factors[key] = self.build.call(op, left, right, like=like)
        return self._factors[key]
