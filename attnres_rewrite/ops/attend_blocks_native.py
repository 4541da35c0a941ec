"""``torch.ops.attnres.attend_blocks_native``: ``attend_blocks`` as one compiled function for all numbers of blocks.

Inductor's expansions of ``attend_blocks`` are other kernels for every number of blocks and of reads, in a model of
layers that are compiled once most of what is compiled. This operator is not expanded: on a CPU it is a C++ function
(``attend_blocks.cpp``) that takes both as numbers, compiled by Inductor's compiler into its cache, once for a dtype.
Elsewhere, for blocks of several dtypes, and where there is no compiler, it does what ``attend_blocks`` does eagerly.

Its backward can add what the gradients of the blocks are added to in any case, ``added``: a block that n groups of
reads attend over has a gradient of n terms, so that their sum would be another kernel for every block.
"""

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
from attnres_rewrite.ops import attend_blocks, attend_blocks_expanded
from attnres_rewrite.ops.arithmetic import compute_dtype, refuse_tangents

_FORWARD, _BACKWARD = "attnres::attend_blocks_native", "attnres::attend_blocks_native_backward"

# `added` has a tensor for every flag in `added_to`, of which there is one a block.
torch.library.define(_FORWARD, f"({attend_blocks.INPUTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    _BACKWARD,
    f"(Tensor[] grads, {attend_blocks.INPUTS}, bool[] wanted, Tensor[] added, bool[] added_to) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

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
        _logger.info("attend_blocks is not compiled for %s: %s", dtype, str(error).splitlines()[:1])
        return None


def takes(blocks: Sequence[Tensor]) -> bool:
    """Whether there is a compiled function for ``blocks``, which may be fake."""
    first = blocks[0]
    alike = all(b.device.type == "cpu" and b.dtype == first.dtype and _compat.is_plain(b) for b in blocks)
    return alike and library(first.dtype) is not None


def _usable(blocks: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """The library for ``blocks``, whose arithmetic is in ``dtype``, if it takes them."""
    first = blocks[0]
    if any(block.device.type != "cpu" or block.dtype != first.dtype for block in blocks):
        return None
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return library(first.dtype) if dtype == wide else None


def _sizes(blocks: Sequence[Tensor], reads: int, eps: float, scale: float) -> Any:
    width = blocks[0].shape[-1]
    rows = blocks[0].numel() // width if width else 0
    return ctypes.byref(_Sizes(len(blocks), reads, rows, width, torch.get_num_threads(), eps, scale))


def _pointer(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    dtype = compute_dtype(*blocks, *queries, *gains)
    if (functions := _usable(blocks, dtype)) is None:
        return attend_blocks.forward(blocks, queries, gains, eps, scale)
    attend_blocks_expanded.check_reads(blocks, queries, gains)
    refuse_tangents("attend_blocks_native", *blocks, *queries, *gains)
    with torch.autocast("cpu", enabled=False):
        q = attend_blocks_expanded.folded_queries(blocks, queries, gains)
    blocks, shape = [block.contiguous() for block in blocks], blocks[0].shape
    mixed = [q.new_empty(shape, dtype=blocks[0].dtype) for _ in queries]
    log_sums = [q.new_empty((*shape[:-1], 1)) for _ in queries]
    sizes = _sizes(blocks, len(queries), eps, scale)
    functions.attend(sizes, _pointers(blocks), _pointer(q), _pointers(mixed), _pointers(log_sums))
    return [*mixed, *log_sums]


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
    dtype = compute_dtype(*blocks, *queries, *gains)
    if (functions := _usable(blocks, dtype)) is None:
        found = attend_blocks.backward(grads, blocks, queries, gains, eps, scale, wanted)
        more = [tensor for tensor, want in zip(of_block, wanted[:n], strict=True) if want]
        sums = [d if tensor is None else d + tensor for d, tensor in zip(found[: len(more)], more, strict=True)]
        return sums + found[len(more) :]
    refuse_tangents("attend_blocks_native_backward", *grads, *blocks, *queries, *gains)
    with torch.autocast("cpu", enabled=False):
        q = attend_blocks_expanded.folded_queries(blocks, queries, gains)
        blocks = [block.contiguous() for block in blocks]
        d_mixed = [grad.to(blocks[0].dtype).contiguous() for grad in grads[:reads]]
        d_log_sums = [grad.to(dtype).contiguous() for grad in grads[reads:]]
        more = [None if tensor is None else tensor.contiguous() for tensor in of_block]
        d_blocks = [torch.empty_like(block) if want else None for block, want in zip(blocks, wanted[:n], strict=True)]
        d_q = q.new_zeros(torch.get_num_threads(), *q.shape) if any(wanted[n:]) else None
        functions.attend_backward(
            _sizes(blocks, reads, eps, scale),
            _pointers(blocks),
            _pointer(q),
            _pointers(d_mixed),
            _pointers(d_log_sums),
            _pointers(more),
            _pointers(d_blocks),
            None if d_q is None else _pointer(d_q),
        )
        found = [tensor for tensor in d_blocks if tensor is not None]
        if d_q is None:
            return found
        rows = [row.clone() for row in d_q.sum(0)]
        return found + attend_blocks_expanded.vector_grads(rows, queries, gains, wanted[n:])


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return attend_blocks.fake_backward(*arguments[:-2])


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    def find(*arguments: Any) -> Any:
        nothing = [False] * len(arguments[1])
        return torch.ops.attnres.attend_blocks_native_backward(*arguments, [], nothing)

    return attend_blocks.differentiate(ctx, grads, find)


torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
torch.library.register_fake(_FORWARD, attend_blocks.fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=attend_blocks.setup_context)
