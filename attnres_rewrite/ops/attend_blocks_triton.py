"""Phase one on a GPU for any number of blocks: ``attend_blocks.py`` has the equations.

Two kernels that stream. One passes over the blocks and finds the logits, with a row a warp, so that the many sums over
a row need no barrier; the other passes over them again and writes what is as wide as a block, a tile of columns a
program. The backward is alike. What is read twice costs less than what one pass took: with all of a row in registers
it ran at a quarter of the memory's bandwidth (docs/performance.md).

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnres_rewrite.ops import attend_blocks_kernels as kernels

# Reads that one launch takes.
_READS = 4
# Columns of a program that writes; rows of one in the forward; in the backward programs along the rows, of which each
# has gradients of the queries of its own, and the least rows of one.
_COLUMNS, _ROWS, _PROGRAMS, _LEAST_ROWS = 1024, 4, 256, 16


def _counted(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``tensors``, made as many as one of a few numbers: each is a kernel of its own."""
    count = max(8, triton.next_power_of_2(len(tensors)))
    return (*tensors, *[tensors[0]] * (count - len(tensors)))


def attend(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``attend_blocks_cpp.attend`` gives, in float32.

    Args:
        blocks: Contiguous, ``[..., D]``, of one dtype on one GPU.
        queries: ``[D]``, one a read, of one dtype.
        gains: Likewise, or none.
        eps: Of the norms.
        scale: Of the logits.
    """
    first, width = blocks[0], blocks[0].shape[-1]
    mixed = [torch.empty_like(first) for _ in queries]
    log_sums = [first.new_empty((*first.shape[:-1], 1), dtype=torch.float32) for _ in queries]
    if first.numel() == 0:
        return mixed, log_sums
    n, rows = len(blocks), first.numel() // width
    given = _counted(blocks)
    with torch.cuda.device(first.device):
        keys = _folded(queries, gains)
        for part in _groups(len(queries)):
            scores = _Scores(given, keys[part], n, eps, scale)
            outputs, fixed = (tuple(mixed[part]), tuple(log_sums[part])), scores.fixed | _tile(width)
            grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, fixed["D"])
            kernels.mix[grid](given, scores.logits, scores.log_sums, *outputs, n, rows, width, R=_ROWS, **fixed)
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
    """What ``attend_blocks_cpp.attend_backward`` does, for what :func:`attend` takes; the arithmetic is in float32."""
    first, reads, width = blocks[0], len(queries), blocks[0].shape[-1]
    if first.numel() == 0:
        return [torch.zeros_like(vector) for vector in (*queries, *gains)] if want_vectors else []
    n, rows, given, want = len(blocks), first.numel() // width, _counted(blocks), _flags(d_blocks)
    per_program = max(_LEAST_ROWS, triton.cdiv(rows, _PROGRAMS))
    parts = triton.cdiv(rows, per_program)
    with torch.cuda.device(first.device):
        keys = _folded(queries, gains)
        d_keys = keys.new_empty(parts, reads, width) if want_vectors else keys
        for part in _groups(reads):
            # Of the second group on, what is there is what is added to.
            more = d_blocks if part.start else added
            scores = _Scores(given, keys[part], n, eps, scale, (tuple(d_mixed[part]), tuple(d_log_sums[part])))
            tensors = scores.of_backward(), _filled(more, first), _filled(d_blocks, first)
            own = d_keys[:, part] if want_vectors else keys
            fixed = scores.fixed | _tile(width) | {"WANT_QUERIES": want_vectors}
            sizes = n, reads, _flags(more), want, rows, per_program, width
            kernels.differentiate[parts, triton.cdiv(width, fixed["D"])](
                given, keys[part], tuple(d_mixed[part]), *tensors[0], *tensors[1:], own, *sizes, scale, **fixed
            )
        return _unfolded(d_keys, queries, gains) if want_vectors else []


class _Scores:
    """What :func:`kernels.score` finds of a group of reads, in tables that live as long as this."""

    def __init__(
        self, blocks: tuple[Tensor, ...], keys: Tensor, n: int, eps: float, scale: float, grads: Any = None
    ) -> None:
        first, (reads, width) = blocks[0], keys.shape
        rows = first.numel() // width
        self.logits, self.log_sums = keys.new_empty(rows, n, reads), keys.new_empty(rows, reads)
        self.fixed = {"COUNT": len(blocks), "READS": reads}
        if grads is not None:
            self.d_weights, self.means = torch.empty_like(self.logits), torch.empty_like(self.log_sums)
            self.inverse = keys.new_empty(rows, n)
        of_backward = (self.logits,) * 3 if grads is None else (self.d_weights, self.means, self.inverse)
        given = ((keys,) * reads, (keys,) * reads) if grads is None else grads
        # As many columns as a warp loads at once.
        settings = {"D": 512 // first.element_size(), "BACKWARD": grads is not None, "num_warps": 1, **self.fixed}
        tables = self.logits, self.log_sums, *of_backward
        kernels.score[rows,](blocks, keys, *given, *tables, n, width, eps, scale, **settings)

    def of_backward(self) -> tuple[Tensor, ...]:
        return self.logits, self.log_sums, self.d_weights, self.means, self.inverse


def _groups(reads: int) -> list[slice]:
    return [slice(start, min(start + _READS, reads)) for start in range(0, reads, _READS)]


def _tile(width: int) -> dict[str, int]:
    """Columns of a program that writes; a warp takes 256 of them."""
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    return {"D": columns, "num_warps": max(1, columns // 256)}


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
    grid, fixed = (
        (triton.cdiv(width, 128), reads),
        {"COUNT": len(given[0]), "GAINS": bool(gains), "P": 64, "D": 128, "num_warps": 8},
    )
    kernels.unfold[grid](d_keys, *given, parts, reads, width, **fixed)
    return d_queries + d_gains
