"""What ``torch.compile`` makes of ``torch.ops.attnres.attend_blocks`` for Inductor, by device.

On a CPU Inductor fuses an expansion with what is around it. On a GPU it is the Triton kernel of
``attend_blocks_native`` where that takes the blocks: Inductor's own is another one for every number of blocks, each of
which takes seconds to compile, and stores a table as large as the stream for the gradient of every query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops import attend_blocks_native
from attnres_rewrite.ops.attend_blocks_expanded import (
    expand_backward,
    expand_backward_on_cpu,
    expand_forward,
    expand_forward_on_cpu,
)

_ops: Any = torch.ops.attnres


def _forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], *settings: float
) -> list[Tensor]:
    if blocks[0].device.type == "cpu":
        return expand_forward_on_cpu(blocks, queries, gains, *settings)
    if _native(blocks, queries, gains):
        found: list[Tensor] = _ops.attend_blocks_native(blocks, queries, gains, *settings)
        return found
    return expand_forward(blocks, queries, gains, *settings, for_inductor=True)


def _backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    given = grads, blocks, queries, gains, eps, scale, wanted
    if blocks[0].device.type == "cpu":
        return expand_backward_on_cpu(*given)
    if _native(blocks, queries, gains):
        found: list[Tensor] = _ops.attend_blocks_native_backward(*given, [], [False] * len(blocks))
        return found
    return expand_backward(*given, for_inductor=True)


def _native(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> bool:
    return attend_blocks_native.takes(blocks) and attend_blocks_native.usable(blocks, queries, gains) is not None


register_inductor_decomposition(_ops.attend_blocks.default, _forward)
register_inductor_decomposition(_ops.attend_blocks_backward.default, _backward)
