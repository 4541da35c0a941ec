"""What the analyses find: residual streams, their branches, layers, blocks and sites.

Frozen: an analysis writes these once, and the rewrite only reads them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the stream.

    Attributes:
        kind: ``"add"`` (the stream plus a branch output), ``"scale"`` (the stream times ``operand``) or ``"bias"``
            (the stream plus something that does not compute from it).
        node: The node that computes the new stream value.
        operand: What is added or multiplied: a node or, for a scale, a number.
        alpha: Factor on the operand of an add (``torch.add(x, f, alpha=...)``).
    """

    kind: Literal["add", "scale", "bias"]
    node: Node
    operand: Node | float
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch output: the steps up to the next stream value that something reads.

    More than one add means that nothing reads the value in between, as with a parallel residual
    ``x + attn(n(x)) + mlp(n(x))``: together they are one branch output.
    """

    steps: tuple[Step, ...]

    @property
    def value(self) -> Node:
        """The stream value after this branch, which is read."""
        return self.steps[-1].node

    @property
    def adds(self) -> tuple[Step, ...]:
        """The adds of branch outputs among the steps."""
        return tuple(step for step in self.steps if step.kind == "add")


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """The chain ``x_{k+1} = x_k + f_k(...)`` of one owner module.

    Attributes:
        owner: Path of the deepest module that contains the whole stream and can hold parameters, ``""``
            for the traced root. An ``nn.Sequential`` cannot: its forward would run them.
        scope: Path of the deepest module that contains the whole stream; its children are the layers.
        root: The stream's first value b_0.
        branches: The branch outputs f_1 to f_S, in order. Each ends in a value that is read.
        width: D, the size of the last dimension.
    """

    owner: str
    scope: str
    root: Node
    branches: tuple[Branch, ...]
    width: int


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """A stream with its layers grouped into blocks.

    Attributes:
        stream: The stream.
        layers: Name of each layer, in order; none where the blocks are recorded, and not grouped from layers.
        layer_of: For every branch, the index of its layer.
        block_of: For every branch, the index of its block, from 0.
        sources: For every site (one per branch), the number of its sources.
    """

    stream: ResidualStream
    layers: tuple[str, ...]
    layer_of: tuple[int, ...]
    block_of: tuple[int, ...]

    @classmethod
    def recorded(cls, stream: ResidualStream, block_sizes: Sequence[int]) -> StreamPlan:
        """The plan for ``stream`` whose blocks were settled in another graph of the same model."""
        block_of = tuple(block for block, size in enumerate(block_sizes) for _ in range(size))
        assert len(block_of) == len(stream.branches)
        return cls(stream, (), (), block_of)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Number of branches in every block."""
        return tuple(len(list(branches)) for _, branches in itertools.groupby(self.block_of))

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return self.block_of[-1] + 1

    @property
    def sources(self) -> tuple[int, ...]:
        """Number of sources of every site: b_0, the complete blocks, and the partial where there is one."""
        counts = []
        for site, block in enumerate(self.block_of):
            # A complete block and an open partial count the same: one source each.
            assert site == 0 or block - self.block_of[site - 1] in (0, 1)
            counts.append(block + 2)
        return tuple(counts)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An add that was considered and is not part of a stream.

    Attributes:
        node: The add.
        reason: Why not.
    """

    node: Node
    reason: str


def rejected_lines(rejected: Sequence[tuple[str, str]]) -> list[str]:
    """One line for all the adds that a line of source code makes and that are rejected for one reason.

    Args:
        rejected: Source line, with its module, and reason of every add.
    """
    # The first of them stands for the others, which differ in the module: layer by layer, as a rule.
    groups: dict[tuple[str, str], list[str]] = {}
    for where, reason in rejected:
        groups.setdefault((where.partition("': ")[2], reason), []).append(where)
    return [f"  {len(places):4d}x {places[0]}: {reason}" for (_, reason), places in groups.items()]
