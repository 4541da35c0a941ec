"""Pass 5: the sums per block, one AttnRes node per site, the old adds gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph import GraphBuilder, op_name, require_tensor, same_shape, tensor_of
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.patterns import Transparent
from attnres_rewrite.streams import Branch, Step, StreamPlan

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SiteParameters:
    """The nodes that hold one site's parameters: pseudo-query ``[D]`` and key gain ``[D]`` or ``None``."""

    query: Node
    gain: Node | None


@dataclasses.dataclass(frozen=True)
class Site:
    """What was inserted for one read.

    Attributes:
        node: The ``block_attn_res`` node, or the ``merge_partial`` node after the pass ``schedule_reads``.
        read: What is read in place of the stream value: ``node``, or a cast or view of it.
        sources: The nodes it attends over.
        parts: For every source, which terms it sums: 0 is the root b_0, k the k-th branch output f_k. A block is a
            run of branch outputs, so a range says it.
        has_partial: Whether the last source is the partial of a block that is not complete.
    """

    node: Node
    read: Node
    sources: tuple[Node, ...]
    parts: tuple[range, ...]
    has_partial: bool


class InsertAttnRes(Pass):
    """Replace a stream's running sum by Block AttnRes.

    ::

        x_k ──► (+) ──► x_{k+1} ──► reads        f_k ──► (+) ──► partial ─┐
        f_k ─────┘                               b_0 ... b_{n-1} ─────────┴─► block_attn_res ──► reads

    The sources of a site are b_0, the complete blocks, and the partial unless it is empty: disjoint
    sums whose total is the old stream value (paper, Block AttnRes). A scale of the stream is applied
    to every source, over which it distributes; a bias joins the partial.
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
        sites = [writer.branch(k, parameters[k]) for k in range(len(parameters))]
        writer.remove_old_steps()
        module.graph.lint()
        module.recompile()
        return sites

    def summary(self, result: list[Site]) -> str:
        """Counts for the log."""
        return f"{len(result)} sites inserted"


class _Writer:
    """The sources as they stand while the stream is walked from its root to its end."""

    def __init__(self, module: GraphModule, plan: StreamPlan, config: AttnResConfig) -> None:
        self.plan, self.config = plan, config
        self.graph, self.build = module.graph, GraphBuilder(module)
        self.blocks: list[Node] = [plan.stream.root]
        self.parts = [range(1)]
        self.partial: Node | None = None
        self.partial_parts = range(1, 1)

    def branch(self, k: int, parameters: SiteParameters) -> Site:
        branch = self.plan.stream.branches[k]
        for step in branch.steps:
            with self.graph.inserting_before(step.node):
                {"add": self._add, "scale": self._scale, "bias": self._bias}[step.kind](step)
        if branch.adds:
            self.partial_parts = range(self.partial_parts.start, self.partial_parts.stop + 1)
        last_of_block = k + 1 == len(self.plan.block_of) or self.plan.block_of[k + 1] != self.plan.block_of[k]
        if last_of_block:
            assert self.partial is not None
            self.blocks.append(self.partial)
            self.parts.append(self.partial_parts)
            self.partial, self.partial_parts = None, range(self.partial_parts.stop, self.partial_parts.stop)
        with self.graph.inserting_before(branch.value):
            return self._site(branch, parameters)

    def _add(self, step: Step) -> None:
        assert isinstance(step.operand, Node)
        term = self._like(step.operand, step.node, self.plan.stream.root)
        if step.alpha != 1.0:
            term = self.build.call(aten.mul.Tensor, term, step.alpha, like=step.node)
        if self.partial is not None:
            term = self.build.call(aten.add.Tensor, self.partial, term, like=step.node)
        self.partial = term

    def _scale(self, step: Step) -> None:
        self.blocks = [self._scaled(step, block) for block in self.blocks]
        if self.partial is not None:
            self.partial = self._scaled(step, self.partial)

    def _bias(self, step: Step) -> None:
        assert isinstance(step.operand, Node)
        bias = step.operand
        if require_tensor(bias).dim() > 1:
            # A vector fits any shape of the stream; anything else has the shape that it has here.
            if not same_shape(require_tensor(bias), require_tensor(step.node)):
                bias = self.build.call(aten.expand_as.default, bias, _stream_operand(step), like=step.node)
            bias = self._like(bias, step.node, self.plan.stream.root)
        self.partial = (
            bias if self.partial is None else self.build.call(aten.add.Tensor, self.partial, bias, like=step.node)
        )

    def _scaled(self, step: Step, source: Node) -> Node:
        op = aten.div.Tensor if "div" in op_name(step.node) else aten.mul.Tensor
        # A factor that is neither a number nor a vector fits the shape that the stream has here.
        fits_any = not isinstance(step.operand, Node) or require_tensor(step.operand).dim() <= 1
        at_hand = source if fits_any else self._viewed(source, _stream_operand(step), like=step.node)
        return self._viewed(self.build.call(op, at_hand, step.operand, like=step.node), source, like=step.node)

    def _site(self, branch: Branch, parameters: SiteParameters) -> Site:
        sources, parts = list(self.blocks), list(self.parts)
        if self.partial is not None:
            sources.append(self.partial)
            parts.append(self.partial_parts)
        node = self.build.call(
            torch.ops.attnres.block_attn_res.default,
            sources,
            parameters.query,
            parameters.gain,
            self.config.eps,
            self.config.scale,
            self.config.aggregation == "sum",
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
        return Site(node, shaped, tuple(sources), tuple(parts), self.partial is not None)

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
        """Erase the old steps, last first; by then nothing computes from them but size queries."""
        for step in reversed([step for branch in self.plan.stream.branches for step in branch.steps]):
            inputs = step.node.all_input_nodes
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
