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

_SOURCES = [Path(__file__).parent / name for name in ("attend_blocks.cpp", "attend_blocks_python.cpp")]
# How C++ spells the dtype of the blocks and of the arithmetic, and the header that it takes.
_TYPES = {
    torch.float32: ("float", "float", ""),
    torch.float64: ("double", "double", ""),
    torch.bfloat16: ("c10::BFloat16", "float", "#include <c10/util/BFloat16.h>\n"),
    torch.float16: ("c10::Half", "float", "#include <c10/util/Half.h>\n"),
}
# After the lists of tensors: rows, width, threads, eps, scale.
_NUMBERS: list[Any] = [*(ctypes.c_int64,) * 3, *(ctypes.c_double,) * 2]

_logger = logging.getLogger(__name__)


def library(dtype: torch.dtype) -> Any:
    """The compiled functions for blocks of ``dtype``; ``None`` where none can be compiled, with the reason logged."""
    return _library(dtype) if dtype in _TYPES else None


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    block, arithmetic, header = _TYPES[dtype]
    sources = "".join(path.read_text() for path in _SOURCES)
    try:
        functions = _compat.compile_cpp(f"{header}#define BLOCK {block}\n#define ARITHMETIC {arithmetic}\n{sources}")
        functions.find_data_with(ctypes.c_int64(_compat.tensor_data_function()))
    except Exception as error:
        # Whatever keeps it from being compiled, there is another way.
        _logger.warning(
            "phase one of %s is left to Inductor, which takes longer to compile it: its C++ did not compile (%s)",
            dtype,
            next(iter(str(error).splitlines()), repr(error)),
        )
        return None
    for function, lists in ((functions.attend_lists, 5), (functions.attend_backward_lists, 9)):
        function.argtypes, function.restype = [ctypes.py_object] * lists + _NUMBERS, None
    return functions


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
    first, wide = blocks[0], compute_dtype(blocks[0])
    q, g = _in_arithmetic(queries, wide), _in_arithmetic(gains, wide)
    mixed = [torch.empty_like(first) for _ in queries]
    log_sums = [first.new_empty((*first.shape[:-1], 1), dtype=wide) for _ in queries]
    library(first.dtype).attend_lists(list(blocks), q, g, mixed, log_sums, *_sizes(first), eps, scale)
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
    first = blocks[0]
    q, g = (_in_arithmetic(vectors, compute_dtype(first)) for vectors in (queries, gains))
    d_q, d_g = ([torch.empty_like(vector) for vector in vectors] if want_vectors else [] for vectors in (q, g))
    lists = map(list, (blocks, q, g, d_mixed, d_log_sums, added, d_blocks, d_q, d_g))
    library(first.dtype).attend_backward_lists(*lists, *_sizes(first), eps, scale)
    return [d if d.dtype == v.dtype else d.to(v.dtype) for d, v in zip(d_q + d_g, (*queries, *gains), strict=False)]


def _in_arithmetic(vectors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [vector if vector.dtype == dtype else vector.to(dtype) for vector in vectors]


def _sizes(block: Tensor) -> tuple[int, int, int]:
    """Rows, width, and the number of threads."""
    width = block.shape[-1]
    return block.numel() // width if width else 0, width, torch.get_num_threads()
