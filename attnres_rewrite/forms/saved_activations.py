"""What training keeps for the backward: the sources of the sites, and not what the sites make of them.

The plain model keeps every value of its stream, because the norm that reads it needs it for its gradient. A rewritten
model needs the same number of tensors, blocks and partials, as sources of its sites. What a norm reads is now the
result of a site, a tensor more for every read; the partitioner of AOTAutograd keeps most of them. A result is a
weighted sum of sources that are kept in any case, so it is marked here to be computed again, within the kernel that
reads it.

Layers that are compiled once (``compile_layers="once"``) are calls of graphs of their own. What such a call keeps for
the backward and was given itself has to be taken from where it was given: Inductor does not know that an output of a
call may be one of its operands, and would give the memory of the operand to others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.forms.summed_gradients import keep_sums, sum_in_phase_one
from attnres_rewrite.graph.nodes import tensor_of
from attnres_rewrite.passes import PostconditionError
from attnres_rewrite.passes.outline_layers import BODY, calls_in

# By name: the metadata of a node may hold a copy of the operator.
_OPERATORS = ("block_attn_res", "attend_blocks", "attend_blocks_native", "merge_partial")
_SITES = frozenset(f"attnres.{name}.default" for name in _OPERATORS)


def recompute_results(graph: Graph) -> None:
    """Mark, in a joint graph of forward and backward, what may not be kept; run before it is partitioned.

    Depth weights, log-sums and norms of sources, one number a row, may: they are small, and reductions to compute.
    What the user's own activation checkpointing has marked stays as it is.
    """
    take_operands_from_outside(graph)
    sum_in_phase_one(graph)
    keep_sums(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.attnres.attend_blocks_native_forward.default):
        # One kernel for all its results: the partitioner takes a part of them only together with the rest.
        for part in (node, *node.users):
            part.meta.update(_compat.recompute_tag())
    for node in graph.nodes:
        if str(node.meta.get("original_aten")) in _SITES and "recompute" not in node.meta and _is_wide(node):
            node.meta.update(_compat.recompute_tag())


def _is_wide(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dim() > 1 and isinstance(value.shape[-1], int) and value.shape[-1] > 1


def take_operands_from_outside(graph: Graph) -> int:
    """Replace the outputs of called graphs that are operands, or views of one, by what the call was given.

    Returns:
        How many were replaced.

    Raises:
        PostconditionError: An output shares memory with an operand in another way.
    """
    replaced = 0
    for call, body in _calls(graph):
        given = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
        storages = {s for node in given if (s := _storage(node)) is not None}
        outputs = body.graph.output_node().args[0]
        for item in list(call.users):
            output = outputs[item.args[1]]  # type: ignore[index]
            if not isinstance(output, Node) or _storage(output) not in storages:
                continue
            with graph.inserting_before(call):
                item.replace_all_uses_with(_written_outside(output, given, graph))
            graph.erase_node(item)
            replaced += 1
    return replaced


def _calls(graph: Graph) -> Iterator[tuple[Node, GraphModule]]:
    """Every call of a body, with that graph."""
    module = graph.owning_module
    for node in calls_in(graph):
        if BODY in str(node.args[1]):
            yield node, getattr(module, str(node.all_input_nodes[0].target))


def _storage(node: Node) -> int | None:
    value = tensor_of(node)
    return None if value is None else _compat.storage_of(value)


def _written_outside(output: Node, given: dict[Node, Node], graph: Graph) -> Node:
    """What ``output`` of a called graph is, from what the graph was given, written at the insertion point."""
    if output in given:
        return given[output]
    if output.op != "call_function" or _writes(output):
        raise PostconditionError(f"{output.name}, an output of a called graph, is no view of what it was given")
    sources = {source: _written_outside(source, given, graph) for source in output.all_input_nodes}
    return graph.node_copy(output, sources.__getitem__)


def _writes(node: Node) -> bool:
    return isinstance(node.target, _compat.Overload) and bool(_compat.schema_of(node.target).is_mutable)
