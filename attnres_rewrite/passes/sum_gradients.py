"""Pass 9: where every process holds some of the tokens, the gradients of the sites are summed over the processes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.graph.nodes import (
    GraphBuilder,
    is_inside,
    module_stack,
    op_name,
    require_tensor,
    source_line,
    value_of,
)
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.insert_attnres import SiteParameters
from attnres_rewrite.patterns import reads_of, through_transparent
from attnres_rewrite.streams import ResidualStream


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a stream is placed on a mesh of devices.

    Attributes:
        mesh: The mesh.
        placements: For every dimension of the mesh, as a ``DTensor`` has them; dimensions of the tensor count from 0.
        node: Where the graph says so.
    """

    mesh: Any
    placements: tuple[Any, ...]
    node: Node

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds some of the tokens only."""
        return any(placement.is_shard() for placement in self.placements)


class SumGradients(Pass):
    """Sum the gradients of site parameters over the processes that share the tokens of a stream.

    ::

        query ──► block_attn_res        query ──► DTensor, replicated ──► to_local ──► block_attn_res
                                                    gradient: summed ◄── partial

    In sequence parallelism (``SequenceParallel`` of PyTorch) the stream is a plain tensor with the tokens of one
    process, while a query reads all of them: what one process computes is a part of its gradient. A stream of which
    every process has all tokens (tensor parallelism) needs no sum. Data parallelism is the affair of what wraps the
    model.
    """

    def call(
        self, module: GraphModule, stream: ResidualStream, parameters: Sequence[SiteParameters]
    ) -> list[SiteParameters]:
        """The parameters to give to the sites of ``stream``; raises :class:`UnsupportedResidualError`."""
        placement = placement_of(stream)
        _refuse_other_mesh(module, stream, parameters, placement)
        if placement is None or not placement.is_sharded:
            return list(parameters)
        gather = _summing(placement)
        # Where a parameter is defined, and so before any mode that records no gradients.
        return [
            SiteParameters(
                _called(module, gather, one.query),
                *(None if node is None else _called(module, gather, node) for node in (one.gain, one.gate)),
            )
            for one in parameters
        ]

    def ensures(
        self, module: GraphModule, result: list[SiteParameters], stream: ResidualStream, parameters: Sequence[Any]
    ) -> None:
        """Every site has its own parameters."""
        for new, old in zip(result, parameters, strict=True):
            pairs = ((new.query, old.query), (new.gain, old.gain), (new.gate, old.gate))
            if any(now is not then and (now is None or then not in now.all_input_nodes) for now, then in pairs):
                raise PostconditionError(f"{new} does not compute from {old}")

    def summary(self, result: list[SiteParameters]) -> str:
        """Counts for the log."""
        return f"{sum(op_name(one.query) == _NAME for one in result)} sites with summed gradients"


_NAME = "with_summed_gradient"


def placement_of(stream: ResidualStream) -> Placement | None:
    """How ``stream`` is placed, told by where its values come from DTensors or become some; ``None`` if none does.

    Raises:
        UnsupportedResidualError: A process has a part of every token, or a summand of it, so no read is of the whole
            value; or two places of the graph contradict one another.
    """
    found: Placement | None = None
    for node, value in _boundaries(stream):
        one = Placement(value.device_mesh, tuple(_from_zero(p, value.dim()) for p in value.placements), node)
        if any(p.is_partial() or (p.is_shard() and p.dim == value.dim() - 1) for p in one.placements):
            raise UnsupportedResidualError(
                f"the residual stream is {one.placements} on its mesh, at {source_line(node)}: a process has only a "
                "part of every stream value, while Attention Residuals read whole ones. Place the stream as "
                "Replicate() or, over the tokens, as Shard(1)"
            )
        if found is not None and (one.mesh, one.placements) != (found.mesh, found.placements):
            raise UnsupportedResidualError(
                f"the residual stream is {found.placements} on {found.mesh} at {source_line(found.node)}, and "
                f"{one.placements} on {one.mesh} at {source_line(node)}, so there is no telling which gradients of the "
                "sites are to be summed: place all of it alike"
            )
        found = found or one
    return found


def _boundaries(stream: ResidualStream) -> Iterator[tuple[Node, Any]]:
    """Where a value or branch output comes from a DTensor, or a value is read as one, and that DTensor."""
    if (tensors := sys.modules.get("torch.distributed.tensor")) is None:
        return
    for node in (stream.root, *(step.node for step in stream.steps)):
        if isinstance(require_tensor(node), tensors.DTensor):
            raise UnsupportedResidualError(
                f"the residual stream is a DTensor, at {source_line(node)}, for which there is no AttnRes operator: "
                "let the layers' parallel styles give plain tensors (use_local_output=True)"
            )
    comes_from = [through_transparent(n) for n in (stream.root, *stream.branch_outputs)]
    for node in comes_from:
        source = value_of(node.args[0]) if op_name(node) == "to_local" and isinstance(node.args[0], Node) else None
        if isinstance(source, tensors.DTensor):
            yield node, source
    for value in stream.values:
        for read in reads_of(value, stream.values):
            if op_name(read) == "from_local" and isinstance(value_of(read), tensors.DTensor):
                yield read, value_of(read)


def _refuse_other_mesh(
    module: GraphModule, stream: ResidualStream, parameters: Sequence[SiteParameters], placement: Placement | None
) -> None:
    """Raise :class:`UnsupportedResidualError` if other parameters are on a mesh of which the sites know nothing."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or any(isinstance(value_of(n), tensors.DTensor) for n in _origins(parameters)):
        return
    for node in module.graph.nodes:
        value = value_of(node) if node.op in ("placeholder", "get_attr") else None
        if not isinstance(value, tensors.DTensor) or (placement is not None and value.device_mesh == placement.mesh):
            continue
        if (user := next((u for u in node.users if _runs_in(u, stream.owner)), None)) is not None:
            raise UnsupportedResidualError(
                f"a parameter is a DTensor, {value.placements} on {value.device_mesh}, read at {source_line(user)}, "
                "while nothing tells how the residual stream is placed on that mesh: sites that are made now would be "
                "plain tensors, each process with gradients of its own. Where parameters are sharded for data "
                "parallelism, rewrite first, then shard; for tensor parallelism, let the parallel styles of the layers "
                "give plain tensors"
            )


def _origins(parameters: Sequence[SiteParameters]) -> Iterator[Node]:
    """What the parameters of the sites are computed from, as where weights are gathered in the graph."""
    pending = [one.query for one in parameters]
    while pending:
        node = pending.pop()
        yield node
        pending += node.all_input_nodes


def _runs_in(node: Node, owner: str) -> bool:
    return not owner or any(is_inside(path, owner) for path in module_stack(node))


def _from_zero(placement: Any, dimensions: int) -> Any:
    return type(placement)(placement.dim % dimensions) if placement.is_shard() and placement.dim < 0 else placement


def _summing(placement: Placement) -> Callable[[Tensor], Tensor]:
    """A function that gives a parameter as it is, and gives it the sum of the gradients of all processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, whole = placement.mesh, [Replicate()] * len(placement.placements)
    parts = [Partial() if p.is_shard() else Replicate() for p in placement.placements]

    def with_summed_gradient(parameter: Tensor) -> Tensor:
        gathered = DTensor.from_local(parameter, mesh, whole, run_check=False)
        local: Tensor = gathered.to_local(grad_placements=parts)
        return local

    return with_summed_gradient


def _called(module: GraphModule, function: Callable[[Tensor], Tensor], parameter: Node) -> Node:
    graph, after = module.graph, parameter
    if parameter.op == "placeholder":
        after = next(node for node in graph.nodes if node.op == "placeholder" and node.next.op != "placeholder")
    with graph.inserting_after(after):
        return GraphBuilder(module).call(function, parameter, like=parameter, name=f"{parameter.name}_summed")
