"""Phase one on a GPU for any number of blocks: ``attend_blocks.py`` has the equations.

A program computes rows: it loads a block once, takes its norm and its product with every query, and updates a softmax
and a sum of every read as it goes (as flash attention does over keys), so that neither a source is read twice nor the
kernel depends on the number of blocks. Inductor's own kernels read every source twice where a row is wider than
registers, and are others for every number of blocks.

The gradient needs all depth weights of a row before the first gradient of a block, so the backward passes over the
blocks of a row twice; the second time they are in the L2 cache, as no more rows are in flight than it holds.

Importing this module imports Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnres_rewrite.ops import attend_blocks_kernels as kernels

# Elements of all reads of a program, padded to powers of two: what its registers hold with 16 warps.
_IN_REGISTERS = 1 << 14
# Warps of a multiprocessor in the backward, of which every program has gradients of the queries of its own.
_WARPS = 16


def _counted(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``tensors``, made as many as one of a few numbers: each is a kernel of its own."""
    count = max(8, triton.next_power_of_2(len(tensors)))
    return (*tensors, *[tensors[0]] * (count - len(tensors)))


def _shape(reads: int, width: int) -> tuple[int, dict[str, int]]:
    """Reads that one program takes, and what a kernel is compiled for."""
    padded = triton.next_power_of_2(width)
    group = min(reads, max(1, _IN_REGISTERS // padded))
    settings = {"S": triton.next_power_of_2(group), "D": padded, "num_warps": min(16, max(4, padded // 256))}
    return group, settings


def attend(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Mixed ``[..., D]`` of every read and log-sums ``[..., 1]``.

    Args:
        blocks: Contiguous, ``[..., D]``, of one dtype on one GPU.
        queries: ``[D]``, one a read, of one dtype.
        gains: Likewise, or none.
        eps: Of the norms.
        scale: Of the logits.
    """
    first, reads, width = blocks[0], len(queries), blocks[0].shape[-1]
    mixed = [torch.empty_like(first) for _ in queries]
    log_sums = [first.new_empty((*first.shape[:-1], 1), dtype=torch.float32) for _ in queries]
    if first.numel() == 0:
        return mixed, log_sums
    group, settings = _shape(reads, width)
    given = _counted(blocks)
    with torch.cuda.device(first.device):
        keys = _folded(queries, gains)
        for start in range(0, reads, group):
            part = slice(start, min(start + group, reads))
            outputs = tuple(mixed[part]), tuple(log_sums[part])
            fixed = {"COUNT": len(given), "READS": part.stop - start, **settings}
            kernels.attend[first.numel() // width,](
                given, keys[part], *outputs, len(blocks), width, eps, scale, **fixed
            )
    return mixed, log_sums


def attend_backward(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    d_mixed: Sequence[Tensor],
    d_log_sums: Sequence[Tensor],
    added: Sequence[Tensor | None],
    d_blocks: Sequence[Tensor | None],
    *,
    want_vectors: bool,
    eps: float,
    scale: float,
) -> list[Tensor]:
    """Write the gradients of the blocks to ``d_blocks``; return those of queries and gains, if they are wanted.

    Args:
        blocks: As in :func:`attend`.
        queries: As in :func:`attend`.
        gains: As in :func:`attend`.
        d_mixed: A gradient ``[..., D]`` of every read, contiguous, in the dtype of the blocks.
        d_log_sums: A gradient ``[..., 1]`` of every read, contiguous, float32.
        added: What is added to the gradient of a block, for every block; contiguous, in its dtype.
        d_blocks: Where the gradient of a block is written, for every block; ``None`` where none is wanted.
        want_vectors: Whether gradients of queries and gains are wanted.
        eps: Of the norms.
        scale: Of the logits.
    """
    first, reads, width = blocks[0], len(queries), blocks[0].shape[-1]
    if first.numel() == 0:
        return [torch.zeros_like(vector) for vector in (*queries, *gains)] if want_vectors else []
    group, settings = _shape(reads, width)
    given, rows = _counted(blocks), first.numel() // width
    programs = min(rows, _WARPS // settings["num_warps"] * _multiprocessors(first.device))
    want = _flags(d_blocks)
    with torch.cuda.device(first.device):
        keys = _folded(queries, gains)
        d_keys = keys.new_empty(programs, reads, width) if want_vectors else keys
        for start in range(0, reads, group):
            part = slice(start, min(start + group, reads))
            # Of the second group on, what is there is what is added to.
            more = d_blocks if start else added
            grads = tuple(d_mixed[part]), tuple(d_log_sums[part]), _filled(more, first), _filled(d_blocks, first)
            own = d_keys[:, part] if want_vectors else keys
            fixed = {"COUNT": len(given), "READS": part.stop - start, "WANT_QUERIES": want_vectors, **settings}
            sizes = len(blocks), reads, _flags(more), want, rows, width
            kernels.attend_backward[programs,](given, keys[part], *grads, own, *sizes, eps, scale, **fixed)
        return _unfolded(d_keys, queries, gains) if want_vectors else []


def _flags(tensors: Sequence[Tensor | None]) -> int:
    return sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)


def _filled(tensors: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    return _counted([other if tensor is None else tensor for tensor in tensors])


def _folded(queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Queries times gains, ``[S, D]``, float32."""
    reads, width = len(queries), queries[0].numel()
    keys = queries[0].new_empty(reads, width, dtype=torch.float32)
    grid, given = (triton.cdiv(width, 1024), reads), _counted(queries)
    kernels.fold[grid](given, _counted(gains or queries), keys, width, COUNT=len(given), GAINS=bool(gains), D=1024)
    return keys


def _unfolded(d_keys: Tensor, queries: Sequence[Tensor], gains: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the queries, then of the gains, from the parts ``[programs, S, D]`` of that of their product."""
    parts, reads, width = d_keys.shape
    d_queries, d_gains = [torch.empty_like(q) for q in queries], [torch.empty_like(g) for g in gains]
    given = [_counted(vectors) for vectors in (queries, gains or queries, d_queries, d_gains or d_queries)]
    grid, fixed = (triton.cdiv(width, 128), reads), {"COUNT": len(given[0]), "GAINS": bool(gains), "P": 32, "D": 128}
    kernels.unfold[grid](d_keys, *given, parts, reads, width, **fixed)
    return d_queries + d_gains


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
