"""What a pattern is: a name, a chain drawn in its docstring, and ``match``."""

from __future__ import annotations

import dataclasses
from typing import Generic, Protocol, TypeVar

from torch.fx import Node

T_co = TypeVar("T_co", covariant=True)


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a node does not match a pattern.

    Attributes:
        reason: One clause, for logs and error messages.
        node: The culprit, which need not be the node that was asked about.
    """

    reason: str
    node: Node


class Pattern(Protocol, Generic[T_co]):
    """A shape in the graph, recognised from its last node.

    Attributes:
        name: What messages call it.
    """

    name: str

    def match(self, node: Node) -> T_co | Mismatch:
        """The parts of the pattern that ends in ``node``, or why it does not match."""
        ...
