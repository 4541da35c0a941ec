"""What the analyses find: residual streams, their steps, branches, layers, blocks and sites.

Frozen: an analysis writes these once, and the rewrite only reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from torch.fx import Node

AddendKind = Literal["value", "branch", "bias", "root"]
StepKind = Literal["add", "link", "scale", "bias"]


@dataclasses.dataclass(frozen=True)
class Addend:
    """One operand of a step, times a number.

    Attributes:
        kind: ``"value"`` (a value of the stream), ``"branch"`` (a branch output, which computes from the stream),
            ``"bias"`` (what does not), or ``"root"`` (a bias that the root itself is a sum of, as an embedding is).
        node: The operand; of a value the node that computes it, without casts and views.
        factor: The number that it is multiplied by.
    """

    kind: AddendKind
    node: Node
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One linear operation that gives a value of the stream: a sum of addends, or one value times a tensor.

    Attributes:
        node: The node that computes the new stream value.
        addends: What it sums. One of them at least is a value of the stream.
        scale: The tensor that the sum is multiplied by; it does not compute from the stream.
        divides: Whether ``scale`` is a divisor.
    """

    node: Node
    addends: tuple[Addend, ...]
    scale: Node | None = None
    divides: bool = False

    @property
    def kind(self) -> StepKind:
        """``"add"`` of a branch output, ``"link"`` of stream values, ``"bias"``, or ``"scale"``."""
        kinds = [addend.kind for addend in self.addends]
        if "branch" in kinds:
            return "add"
        if kinds.count("value") > 1 or "root" in kinds:
            return "link"
        return "bias" if "bias" in kinds else "scale"

    @property
    def values(self) -> tuple[Addend, ...]:
        """The values of the stream that the step computes from."""
        return tuple(addend for addend in self.addends if addend.kind == "value")

    @property
    def outputs(self) -> tuple[Addend, ...]:
        """The branch outputs that the step adds."""
        return tuple(addend for addend in self.addends if addend.kind == "branch")


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch output: the steps that lead to a stream value that something reads, and to none that is read before.

    More than one add means that nothing reads the value in between, as with a parallel residual
    ``x + attn(n(x)) + mlp(n(x))``: together they are one branch output. No add means that a value is read again,
    scaled or with others mixed in.

    Attributes:
        value: The stream value that is read.
        steps: In graph order.
    """

    value: Node
    steps: tuple[Step, ...]

    @property
    def adds(self) -> tuple[Step, ...]:
        """The adds of branch outputs among the steps."""
        return tuple(step for step in self.steps if step.kind == "add")


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """The values of one owner module that are linear combinations of a root, branch outputs and biases.

    Attributes:
        owner: Path of the deepest module that contains the whole stream and can hold parameters, ``""``
            for the traced root. An ``nn.Sequential`` cannot: its forward would run them.
        scope: Path of the deepest module that contains the whole stream; its children are the layers.
        root: The stream's first value b_0.
        branches: The branch outputs f_1 to f_S, by depth. Each ends in a value that is read.
        width: D, the size of the last dimension.
        steps: Every step, in graph order. One that is in no branch changes the root's part alone; a read of its value
            has one source and no site.
    """

    owner: str
    scope: str
    root: Node
    branches: tuple[Branch, ...]
    width: int
    steps: tuple[Step, ...]

    @functools.cached_property
    def values(self) -> frozenset[Node]:
        """The nodes that compute a value of the stream, those that are only linked on included."""
        return frozenset([self.root, *(step.node for step in self.steps)])

    @functools.cached_property
    def branch_outputs(self) -> frozenset[Node]:
        """The nodes that compute a branch output."""
        return frozenset(addend.node for step in self.steps for addend in step.outputs)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """A stream with its layers grouped into blocks.

    Attributes:
        stream: The stream.
        layers: Name of each layer, in order; none where the blocks are recorded, and not grouped from layers.
        layer_of: For every branch, the index of its layer.
        block_of: For every branch, the index of its block, from 0.
        why: Why there are so many blocks, where that was not said but chosen.
    """

    stream: ResidualStream
    layers: tuple[str, ...]
    layer_of: tuple[int, ...]
    block_of: tuple[int, ...]
    why: str | None = None

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

    @functools.cached_property
    def block_of_step(self) -> Mapping[Node, int]:
        """For the node of every step the block, from 1, that what it adds belongs to; 0 for the root's part."""
        blocks = dict.fromkeys((step.node for step in self.stream.steps), 0)
        for branch, block in zip(self.stream.branches, self.block_of, strict=True):
            blocks.update((step.node, block + 1) for step in branch.steps)
        return blocks

    @functools.cached_property
    def parts(self) -> Mapping[Node, frozenset[int]]:
        """The parts of every stream value that are not empty: 0 for the root's, n for that of block n, from 1."""
        parts = {self.stream.root: frozenset({0})}
        for step in self.stream.steps:
            # A branch output is linked on as the one part that it is.
            for output in step.outputs:
                parts.setdefault(output.node, frozenset({self.part_of(step, output)}))
            parts[step.node] = frozenset().union(
                *(
                    parts[addend.node] if addend.kind == "value" else {self.part_of(step, addend)}
                    for addend in step.addends
                )
            )
        return parts

    def part_of(self, step: Step, addend: Addend) -> int:
        """The part that a new term joins: the root's, or that of the block in progress.

        A branch output that was added before, in an earlier block, stays a term of that.
        """
        if addend.kind == "root":
            return 0
        block = self.block_of_step[step.node]
        return self._block_of_output.get(addend.node, block) if addend.kind == "branch" else block

    @functools.cached_property
    def _block_of_output(self) -> Mapping[Node, int]:
        blocks: dict[Node, int] = {}
        for step in self.stream.steps:
            for output in step.outputs:
                blocks.setdefault(output.node, self.block_of_step[step.node])
        return blocks

    @property
    def sources(self) -> tuple[int, ...]:
        """Number of sources of every site: the parts of the value that is read."""
        return tuple(len(self.parts[branch.value]) for branch in self.stream.branches)


@dataclasses.dataclass(frozen=True)
class RejectedAdd:
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
