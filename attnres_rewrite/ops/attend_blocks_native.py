"""``torch.ops.attnres.attend_blocks_native``: ``attend_blocks`` as one compiled function for all numbers of blocks.

Inductor's expansions of ``attend_blocks`` are other kernels for every number of blocks and of reads, in a model of
layers that are compiled once most of what is compiled. This operator is not expanded: on a CPU it is a C++ function
(:mod:`attend_blocks_cpp`), on a GPU a Triton kernel (:mod:`attend_blocks_triton`), both of which take the number of
blocks as a number. For blocks of several dtypes, and where there is no compiler, it does what ``attend_blocks`` does
eagerly.

Inductor calls ``attend_blocks_native_forward``, which is what is left of it when autograd is done: what autograd does
in Python at every call, for nothing in a compiled graph, takes a third of phase one of a small model
(``benchmarks/phase_one.py``).

Its backward can add what the gradients of the blocks are added to in any case, ``added``: a block that n groups of
reads attend over has a gradient of n terms, so that their sum would be another kernel for every block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite import _compat
from attnres_rewrite.ops import attend_blocks, attend_blocks_cpp, attend_blocks_expanded
from attnres_rewrite.ops.arithmetic import compute_dtype, refuse_tangents

_NATIVE = "attnres::attend_blocks_native"
_FORWARD, _BACKWARD = f"{_NATIVE}_forward", f"{_NATIVE}_backward"

# `added` has a tensor for every flag in `added_to`, of which there is one a block.
for _name in (_NATIVE, _FORWARD):
    torch.library.define(_name, f"({attend_blocks.INPUTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    _BACKWARD,
    f"(Tensor[] grads, {attend_blocks.INPUTS}, bool[] wanted, Tensor[] added, bool[] added_to) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# The Triton kernels have a flag for every block in one integer.
_MOST_BLOCKS = 60
_ON_GPU = (torch.bfloat16, torch.float16, torch.float32)


def takes(blocks: Sequence[Tensor]) -> bool:
    """Whether there is a compiled function for ``blocks``, which may be fake."""
    return all(_compat.is_plain(block) for block in blocks) and _implementation(blocks) is not None


def _implementation(blocks: Sequence[Tensor]) -> ModuleType | None:
    """The module with compiled functions for ``blocks``, if there is one."""
    first = blocks[0]
    if any(block.device != first.device or block.dtype != first.dtype for block in blocks):
        return None
    if first.device.type == "cpu":
        return attend_blocks_cpp if attend_blocks_cpp.library(first.dtype) is not None else None
    if first.device.type != "cuda" or len(blocks) > _MOST_BLOCKS or first.dtype not in _ON_GPU or not _has_triton():
        return None
    from attnres_rewrite.ops import attend_blocks_triton

    return attend_blocks_triton


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> ModuleType | None:
    """The module with compiled functions for ``blocks``, if it takes these queries and gains too."""
    wide = torch.float64 if blocks[0].dtype == torch.float64 else torch.float32
    # A kernel picks one of several pointers, which are of one type.
    mixed = blocks[0].device.type != "cpu" and any(len({v.dtype for v in given}) > 1 for given in (queries, gains))
    return None if mixed or compute_dtype(*blocks, *queries, *gains) != wide else _implementation(blocks)


def _native(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    attend_blocks_expanded.check_reads(blocks, queries, gains)
    refuse_tangents("attend_blocks_native", *blocks, *queries, *gains)
    return _forward(blocks, queries, gains, eps, scale)


def _forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    if (functions := usable(blocks, queries, gains)) is None:
        return attend_blocks.forward(blocks, queries, gains, eps, scale)
    mixed, log_sums = functions.attend(*map(_contiguous, (blocks, queries, gains)), eps, scale)
    return [*mixed, *log_sums]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
    added: Sequence[Tensor],
    added_to: Sequence[bool],
) -> list[Tensor]:
    if len(added) != sum(added_to):
        raise ValueError(f"attend_blocks_native_backward: {len(added)} tensors to add for {sum(added_to)} blocks")
    n, reads = len(blocks), len(queries)
    given = iter(added)
    of_block = [next(given) if there else None for there in added_to]
    if (functions := usable(blocks, queries, gains)) is None:
        found = attend_blocks.backward(grads, blocks, queries, gains, eps, scale, wanted)
        more = [tensor for tensor, want in zip(of_block, wanted[:n], strict=True) if want]
        sums = [d if tensor is None else d + tensor for d, tensor in zip(found[: len(more)], more, strict=True)]
        return sums + found[len(more) :]
    refuse_tangents("attend_blocks_native_backward", *grads, *blocks, *queries, *gains)
    blocks, queries, gains = map(_contiguous, (blocks, queries, gains))
    d_blocks = [torch.empty_like(block) if want else None for block, want in zip(blocks, wanted[:n], strict=True)]
    on_vectors = functions.attend_backward(
        blocks,
        queries,
        gains,
        [grad.to(blocks[0].dtype).contiguous() for grad in grads[:reads]],
        [grad.to(compute_dtype(*blocks)).contiguous() for grad in grads[reads:]],
        [None if tensor is None else tensor.to(blocks[0].dtype).contiguous() for tensor in of_block],
        d_blocks,
        want_vectors=any(wanted[n:]),
        eps=eps,
        scale=scale,
    )
    asked = [grad for grad, want in zip(on_vectors, wanted[n:], strict=False) if want]
    return [tensor for tensor in d_blocks if tensor is not None] + asked


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return attend_blocks.fake_backward(*arguments[:-2])


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    def find(*arguments: Any) -> Any:
        nothing = [False] * len(arguments[1])
        return torch.ops.attnres.attend_blocks_native_backward(*arguments, [], nothing)

    return attend_blocks.differentiate(ctx, grads, find)


torch.library.impl(_NATIVE, "CompositeExplicitAutograd", _native)
torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
for _name in (_NATIVE, _FORWARD):
    torch.library.register_fake(_name, attend_blocks.fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)
torch.library.register_autograd(_NATIVE, _differentiate, setup_context=attend_blocks.setup_context)
_compat.register_inductor_decomposition(
    torch.ops.attnres.attend_blocks_native.default, torch.ops.attnres.attend_blocks_native_forward.default
)
