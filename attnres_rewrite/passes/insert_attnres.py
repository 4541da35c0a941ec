"""Pass 10: one sum per block, one AttnRes node per site, the old adds gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph.nodes import GraphBuilder, require_tensor, same_shape, tensor_of
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.passes.parts import Part, PartWriter
from attnres_rewrite.patterns import Transparent, reads_of
from attnres_rewrite.streams import Branch, Step, StreamPlan

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SiteParameters:
    """The nodes of one site's parameters: pseudo-query ``[D]``, key gain ``[D]`` and gate ``[1]``, or ``None``."""

    query: Node
    gain: Node | None
    gate: Node | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """What was inserted for one read.

    Attributes:
        node: The ``block_attn_res`` node, or the ``merge_partial`` node after the pass ``schedule_reads``.
        read: What is read in place of the stream value: ``node``, or a cast or view of it.
        sources: The nodes it attends over.
        parts: For every source, which part of the stream value it is: 0 the root's, n that of block n.
        has_partial: Whether the last source is the part of a block that is not complete.
    """

    node: Node
    read: Node
    sources: tuple[Node, ...]
    parts: tuple[int, ...]
    has_partial: bool


class InsertAttnRes(Pass):
    """Replace a stream's running sum by Block AttnRes.

    ::

        x_k ──► (+) ──► x_{k+1} ──► reads        f_k ──► (+) ──► partial ─┐
        f_k ─────┘                               b_0 ... b_{n-1} ─────────┴─► block_attn_res ──► reads

    The sources of a site are the parts of the stream value that are not empty: that of the root, b_0, and the sums of
    the blocks (paper, Block AttnRes). They are disjoint, and their total is the old value. A scale of the stream, or a
    sum of two of its values, acts part by part; a branch output or a bias joins the part of the block in progress.
    """

    def call(
        self,
        module: GraphModule,
        plan: StreamPlan,
        parameters: Sequence[SiteParameters],
        config: AttnResConfig,
    ) -> list[Site]:
        """Rewrite the stream of ``plan`` in place; ``parameters`` has one entry a site."""
        assert len(parameters) == len(plan.stream.branches)
        writer = _Writer(module, plan, config)
        site_of = {branch.value: k for k, branch in enumerate(plan.stream.branches)}
        sites: dict[int, Site] = {}
        for step in plan.stream.steps:
            with module.graph.inserting_before(step.node):
                writer.step(step)
                if (k := site_of.get(step.node)) is not None:
                    sites[k] = writer.site(plan.stream.branches[k], plan.block_of[k], parameters[k])
        writer.remove_old_steps()
        module.graph.lint()
        module.recompile()
        return [sites[k] for k in range(len(parameters))]

    def summary(self, result: list[Site]) -> str:
        """Counts for the log."""
        return f"{len(result)} sites inserted"


class _Writer:
    """The parts of every stream value, while the stream is walked from its root to its end."""

    def __init__(self, module: GraphModule, plan: StreamPlan, config: AttnResConfig) -> None:
        self.plan, self.config = plan, config
        self.graph, self.build = module.graph, GraphBuilder(module)
        self.arithmetic = PartWriter(self.build, plan.stream.root)
        self.parts: dict[Node, Mapping[int, Part]] = {plan.stream.root: {0: self.arithmetic.term(plan.stream.root)}}
        # After the last branch of a block, the block is complete.
        self.last_of_block = dict(zip(plan.block_of, plan.stream.branches, strict=True))

    def step(self, step: Step) -> None:
        """The parts of the value of ``step`` from those of the values before."""
        summed: dict[int, Part] = {}
        for addend in step.addends:
            if addend.kind == "value":
                new = {n: self.arithmetic.scaled(part, addend.factor) for n, part in self.parts[addend.node].items()}
            else:
                new = {self.plan.part_of(step, addend): self._term(addend.node, step)}
                if addend.kind == "branch":
                    self.parts.setdefault(addend.node, new)
                new = {n: self.arithmetic.scaled(term, addend.factor) for n, term in new.items()}
            for n, part in new.items():
                summed[n] = self.arithmetic.total(summed[n], part, like=step.node) if n in summed else part
        if step.scale is not None:
            summed = {n: self._scaled(part, step) for n, part in summed.items()}
        self.parts[step.node] = summed

    def _term(self, operand: Node, step: Step) -> Part:
        """A branch output, or a bias in a shape that every part can be added to."""
        value = require_tensor(operand)
        if value.dim() <= 1:
            # A vector fits any shape of the stream; anything else has the shape that it has here.
            return self.arithmetic.term(operand)
        if not same_shape(value, require_tensor(step.node)):
            operand = self.build.call(aten.expand_as.default, operand, _stream_operand(step), like=step.node)
        return self.arithmetic.term(self._like(operand, step.node, self.plan.stream.root))

    def _scaled(self, part: Part, step: Step) -> Part:
        assert step.scale is not None
        if require_tensor(step.scale).dim() <= 1:
            return self.arithmetic.scaled_by(part, step.scale, divides=step.divides, like=step.node)
        # A factor that is neither a number nor a vector fits the shape that the stream has here.
        op = aten.div.Tensor if step.divides else aten.mul.Tensor
        source = self.arithmetic.tensor(part, like=step.node)
        at_hand = self._viewed(source, _stream_operand(step), like=step.node)
        node = self.build.call(op, at_hand, step.scale, like=step.node)
        return self.arithmetic.term(self._viewed(node, source, like=step.node))

    def site(self, branch: Branch, block: int, parameters: SiteParameters) -> Site:
        """Put a site in the place of the value of ``branch``, the last of which is in ``block``."""
        parts = sorted(self.parts[branch.value].items())
        sources = [self.arithmetic.tensor(part, like=branch.value) for _, part in parts]
        node = self.build.call(
            torch.ops.attnres.block_attn_res.default,
            sources,
            parameters.query,
            parameters.gain,
            self.config.eps,
            self.config.scale_of(self.plan.stream.width),
            self.config.aggregation == "sum",
            *self._form(parameters),
            like=branch.value,
        )
        region = _compat.reading_region(branch.value)
        branch.value.replace_all_uses_with(node)
        # Asked for its shape alone, the old value goes when the old steps do.
        shaped = self._like(node, branch.value, branch.value)
        if shaped is not node:
            node.replace_all_uses_with(shaped, delete_user_cb=lambda user: user not in _chain(shaped, node))
        for new in {node, shaped}:
            _compat.move_to_region(new, region)
        return Site(node, shaped, tuple(sources), tuple(n for n, _ in parts), branch is not self.last_of_block[block])

    def _form(self, parameters: SiteParameters) -> tuple[Node | float | None, ...]:
        """The last arguments of a read that has not the paper's form."""
        form = (parameters.gate, self.config.base, self.config.value_norm)
        return form if any(part not in (None, 0.0, False) for part in form) else ()

    def _like(self, node: Node, dtype_of: Node, shape_of: Node) -> Node:
        """``node`` in the dtype of one node and the shape of another, with ops only where they differ."""
        typed = require_tensor(dtype_of)
        node = self._viewed(node, shape_of, like=dtype_of)
        if require_tensor(node).dtype != typed.dtype:
            node = self.build.call(aten.to.dtype, node, typed.dtype, like=dtype_of)
        return node

    def _viewed(self, node: Node, shape_of: Node, like: Node) -> Node:
        if same_shape(require_tensor(node), require_tensor(shape_of)):
            return node
        return self.build.call(aten.view_as.default, node, shape_of, like=like)

    def remove_old_steps(self) -> None:
        """Erase the old steps, last first; by then nothing computes from them but size queries.

        A value of the root's part alone stays where something reads it: it has one source, and no site.
        """
        for step in reversed(self.plan.stream.steps):
            inputs = step.node.all_input_nodes
            if self.plan.block_of_step[step.node] == 0 and reads_of(step.node):
                continue
            if step.node.users:
                step.node.replace_all_uses_with(_stream_operand(step))
            self.graph.erase_node(step.node)
            for node in inputs:
                self._erase_unused(node)

    def _erase_unused(self, node: Node) -> None:
        """Erase transparent operations that led to nothing but an old step."""
        while not node.users and isinstance(source := Transparent().match(node), Node):
            self.graph.erase_node(node)
            node = source


def _chain(last: Node, first: Node) -> list[Node]:
    """The nodes from ``last`` back to just after ``first``, by first arguments."""
    nodes = [last]
    while (previous := nodes[-1].args[0]) is not first:
        assert isinstance(previous, Node)
        nodes.append(previous)
    return nodes


def _stream_operand(step: Step) -> Node:
    """An operand of the shape of the new stream value: what the step adds to or scales, or as large."""
    shape = require_tensor(step.node)
    return next(
        n for n in step.node.all_input_nodes if (value := tensor_of(n)) is not None and same_shape(value, shape)
    )
