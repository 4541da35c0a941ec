"""What sums the gradients of a block in the backward, where phase one is one compiled function.

A block is attended over by the reads of all later blocks, so its gradient is a sum with a term from each of them, and
the sums of two blocks have different numbers of terms: Inductor would make a kernel for every block. The function that
computes a term can add the sum so far in the same pass.

On a GPU a kernel adds its term by itself, but only if it has to: Inductor would rather keep the terms, up to one for
every read, until something needs the sum.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import indices, tensor_of

# Positions of `added` and `added_to` among the arguments of the backward.
_ADDED = 7


def sum_in_phase_one(graph: Graph) -> int:
    """Let the backward of phase one add to a block's gradient what is added to it next, in a joint graph.

    ::

        backward' ► d_block' ──► (+) ► ...           backward' ► d_block' ─┐
        backward  ► d_block  ─────┘          to      backward ◄── added ───┘
                                                     backward  ► sum ► ...

    Returns:
        How many additions were folded.
    """
    target = torch.ops.attnres.attend_blocks_native_backward.default
    index, folded = indices(graph), 0
    for call in graph.find_nodes(op="call_function", target=target):
        for item in list(call.users):
            if item.target is operator.getitem and (total := _addition(item)) is not None:
                other = next(node for node in total.all_input_nodes if node is not item)
                if index[other] < index[call] and _add_to(call, item, other):
                    total.replace_all_uses_with(item)
                    graph.erase_node(total)
                    folded += 1
    return folded


def _addition(item: Node) -> Node | None:
    """What adds ``item`` to another tensor of its dtype, and is all that reads it."""
    (total, *others) = item.users
    if others or total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(total.all_input_nodes) != 2:
        return None
    values = [tensor_of(node) for node in (*total.all_input_nodes, total)]
    return total if len({(v.dtype, v.shape) for v in values if v is not None}) == 1 and None not in values else None


def _add_to(call: Node, item: Node, other: Node) -> bool:
    """Let ``call`` add ``other`` to its result ``item``, the gradient of a block to which nothing is added yet."""
    arguments: Any = call.args
    _, blocks, _, _, _, _, wanted, added, added_to = arguments
    result: Any = item.args[1]
    block = [i for i, want in enumerate(wanted) if want][result]
    if block >= len(blocks) or added_to[block]:
        return False
    position = sum(added_to[:block])
    flags = [flag or i == block for i, flag in enumerate(added_to)]
    call.args = (*call.args[:_ADDED], [*added[:position], other, *added[position:]], flags)
    _compat.forget_input_values(call)
    return True


def keep_sums(graph: Graph) -> int:
    """Have every sum of gradients that a site adds to on a GPU stored as soon as it is there, in a joint graph.

    Returns:
        How many sums.
    """
    kept = 0
    for total in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        value = tensor_of(total)
        if value is None or value.device.type == "cpu" or not any(map(_is_gradient, total.all_input_nodes)):
            continue
        # Inductor lays out what it is made to store without gaps and in order, whatever the strides here.
        if not all(isinstance(size, int) for size in value.shape) or not value.is_contiguous():
            continue
        with graph.inserting_after(total):
            stored = graph.call_function(torch.ops.aten.as_strided.default)
        total.replace_all_uses_with(stored)
        stored.args = (total, list(value.shape), list(value.stride()))
        stored.meta.update(total.meta)
        kept += 1
    return kept


def _is_gradient(node: Node) -> bool:
    """Whether ``node`` is what :func:`as_stored` makes of a gradient."""
    origin = str(node.meta.get("original_aten"))
    return node.target is torch.ops.aten.as_strided.default and origin.startswith("attnres.") and "backward" in origin
