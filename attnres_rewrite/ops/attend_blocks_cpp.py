"""Phase one on a CPU for any number of blocks: ``attend_blocks.cpp``, compiled and cached as Inductor's kernels are."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite import _compat
from attnres_rewrite.ops.arithmetic import compute_dtype

_SOURCE = Path(__file__).parent / "attend_blocks.cpp"
# How C++ spells the dtype of the blocks and of the arithmetic, and the header that it takes.
_TYPES = {
    torch.float32: ("float", "float", ""),
    torch.float64: ("double", "double", ""),
    torch.bfloat16: ("c10::BFloat16", "float", "#include <c10/util/BFloat16.h>\n"),
    torch.float16: ("c10::Half", "float", "#include <c10/util/Half.h>\n"),
}

_logger = logging.getLogger(__name__)


class _Sizes(ctypes.Structure):
    """``Sizes`` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "reads", "rows", "width", "threads")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
    )


def library(dtype: torch.dtype) -> Any:
    """The compiled functions for blocks of ``dtype``; ``None`` where none can be compiled, with the reason logged."""
    return _library(dtype) if dtype in _TYPES else None


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    block, arithmetic, header = _TYPES[dtype]
    source = f"{header}#define BLOCK {block}\n#define ARITHMETIC {arithmetic}\n{_SOURCE.read_text()}"
    try:
        return _compat.compile_cpp(source)
    except Exception as error:
        # Whatever keeps it from being compiled, there is another way.
        _logger.warning(
            "phase one of %s is left to Inductor, which takes longer to compile it: its C++ did not compile (%s)",
            dtype,
            next(iter(str(error).splitlines()), repr(error)),
        )
        return None


def attend(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Mixed ``[..., D]`` of every read and log-sums ``[..., 1]``.

    Args:
        blocks: Contiguous, ``[..., D]``, of one dtype that has a :func:`library`.
        queries: ``[D]``, one a read.
        gains: Likewise, or none.
        eps: Of the norms.
        scale: Of the logits.
    """
    first = blocks[0]
    q, g = _in_arithmetic(first, queries), _in_arithmetic(first, gains)
    mixed = [torch.empty_like(first) for _ in queries]
    log_sums = [q[0].new_empty((*first.shape[:-1], 1)) for _ in queries]
    library(first.dtype).attend(
        _sizes(blocks, len(queries), eps, scale),
        _pointers(blocks),
        _pointers(q),
        _pointers(g),
        _pointers(mixed),
        _pointers(log_sums),
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
        d_log_sums: A gradient ``[..., 1]`` of every read, contiguous, in the dtype of the arithmetic.
        added: What is added to the gradient of a block, for every block; contiguous, in its dtype.
        d_blocks: Where the gradient of a block is written, for every block; ``None`` where none is wanted.
        want_vectors: Whether gradients of queries and gains are wanted.
        eps: Of the norms.
        scale: Of the logits.
    """
    q, g = _in_arithmetic(blocks[0], queries), _in_arithmetic(blocks[0], gains)
    d_vectors = [torch.empty_like(vector) for vector in (*q, *g)] if want_vectors else []
    library(blocks[0].dtype).attend_backward(
        _sizes(blocks, len(queries), eps, scale),
        _pointers(blocks),
        _pointers(q),
        _pointers(g),
        _pointers(d_mixed),
        _pointers(d_log_sums),
        _pointers(added),
        _pointers(d_blocks),
        _pointers(d_vectors[: len(q)]),
        _pointers(d_vectors[len(q) :]),
    )
    return [found.to(vector.dtype) for found, vector in zip(d_vectors, (*queries, *gains), strict=False)]


def _in_arithmetic(block: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    dtype = compute_dtype(block)
    return [vector.to(dtype) for vector in vectors]


def _sizes(blocks: Sequence[Tensor], reads: int, eps: float, scale: float) -> Any:
    width = blocks[0].shape[-1]
    rows = blocks[0].numel() // width if width else 0
    return ctypes.byref(_Sizes(len(blocks), reads, rows, width, torch.get_num_threads(), eps, scale))


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    """Addresses as an array; null if there are none."""
    if not tensors:
        return None
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
