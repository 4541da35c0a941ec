"""What training keeps for the backward: the sources of the sites, and not what the sites make of them.

The plain model keeps every value of its stream, because the norm that reads it needs it for its gradient. A rewritten
model needs the same number of tensors, blocks and partials, as sources of its sites. What a norm reads is now the
result of a site, a tensor more for every read; the partitioner of AOTAutograd keeps most of them. A result is a
weighted sum of sources that are kept in any case, so it is marked here to be computed again, within the kernel that
reads it.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import tensor_of

# By name: the metadata of a node may hold a copy of the operator.
_SITES = frozenset(f"attnres.{name}.default" for name in ("block_attn_res", "attend_blocks", "merge_partial"))


def recompute_results(graph: Graph) -> None:
    """Mark, in a joint graph of forward and backward, what may not be kept; run before it is partitioned.

    Depth weights, log-sums and norms of sources, one number a row, may: they are small, and reductions to compute.
    What the user's own activation checkpointing has marked stays as it is.
    """
    for node in graph.nodes:
        if str(node.meta.get("original_aten")) in _SITES and "recompute" not in node.meta and _is_wide(node):
            node.meta.update(_compat.recompute_tag())


def _is_wide(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dim() > 1 and isinstance(value.shape[-1], int) and value.shape[-1] > 1
