"""``torch.ops.attnres.attend_blocks``: phase one of the two-phase schedule (arXiv:2603.15031, section 4).

Pseudo-queries do not depend on the input, so all S reads of a block can attend to the complete blocks before it in one
pass over them. For blocks ``v_i`` ``[..., D]``, queries ``w_s`` ``[D]`` and gains ``g_s`` ``[D]``::

    logit_si = scale * <w_s, v_i * rsqrt(mean(v_i^2, -1) + eps) * g_s>
    m_s      = sum_i softmax_i(logit_si) * v_i          mixed [..., D]
    l_s      = log sum_i exp(logit_si)                  log-sum [..., 1]

``merge_partial`` makes of each the result of its read. Inner arithmetic is float32, or float64 if any input is; ``m``
has the dtype of the blocks, ``l`` that of the arithmetic.

Its expansions are in :mod:`attend_blocks_expanded`; :mod:`attend_blocks_lowered` says which one Inductor gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite.ops.arithmetic import (
    compute_dtype,
    flat_rows,
    promoted_dtype,
    refuse_tangents,
)
from attnres_rewrite.ops.attend_blocks_expanded import (
    check_reads,
    expand_backward,
    expand_forward,
    folded_queries,
    vector_grads,
)
from attnres_rewrite.ops.decomposition_table import register
from attnres_rewrite.ops.pipelining import refuse_unsplit

_FORWARD, _BACKWARD = "attnres::attend_blocks", "attnres::attend_blocks_backward"
# No gains are an empty list. The result is the mixed of every read, then the log-sum of every read.
INPUTS = "Tensor[] blocks, Tensor[] queries, Tensor[] gains, float eps, float scale"

torch.library.define(_FORWARD, f"({INPUTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag per block, query and gain; only those gradients are returned.
torch.library.define(
    _BACKWARD, f"(Tensor[] grads, {INPUTS}, bool[] wanted) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _flat_logits(blocks: Sequence[Tensor], q: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """Inverse RMS ``[n, 1, rows]`` and logits ``[n, S, rows]``.

    By products of a matrix and a vector: one of matrices may be computed in TF32, where the user allows it for the
    model's own.
    """
    n, (reads, width), count = len(blocks), q.shape, blocks[0][..., 0].numel()
    norms, logits = q.new_empty(n, 1, count), q.new_empty(n, reads, count)
    for i, block in enumerate(blocks):
        rows = flat_rows(block, q.dtype)
        torch.linalg.vector_norm(rows, dim=-1, out=norms[i, 0])
        for s in range(reads):
            torch.mv(rows, q[s], out=logits[i, s])
    inverse_rms = norms.square_().div_(width).add_(eps).rsqrt_()
    return inverse_rms, logits.mul_(inverse_rms).mul_(scale)


def forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    """Mixed of every read, then log-sum of every read, eagerly."""
    check_reads(blocks, queries, gains)
    refuse_tangents("attend_blocks", *blocks, *queries, *gains)
    shape = blocks[0].shape
    with torch.autocast(blocks[0].device.type, enabled=False):
        q = folded_queries(blocks, queries, gains)
        _, logits = _flat_logits(blocks, q, eps, scale)
        log_sum = torch.logsumexp(logits, 0)
        weights = torch.softmax(logits, 0)
        mixed = []
        for s in range(len(queries)):
            out = q.new_empty(shape)
            rows = out.view(-1, q.shape[-1])
            torch.mul(flat_rows(blocks[0], q.dtype), weights[0, s, :, None], out=rows)
            for block, weight in zip(blocks[1:], weights[1:], strict=True):
                rows.addcmul_(flat_rows(block, q.dtype), weight[s, :, None])
            mixed.append(out.to(promoted_dtype(blocks)))
        return [*mixed, *(of_read.reshape(*shape[:-1], 1).clone() for of_read in log_sum)]


def backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are ``wanted``, in the order of the inputs, eagerly."""
    refuse_tangents("attend_blocks_backward", *grads, *blocks, *queries, *gains)
    n, reads = len(blocks), len(queries)
    with torch.autocast(blocks[0].device.type, enabled=False):
        q = folded_queries(blocks, queries, gains)
        inverse_rms, logits = _flat_logits(blocks, q, eps, scale)
        weights = torch.softmax(logits, 0)
        d_mixed = [flat_rows(grad, q.dtype) for grad in grads[:reads]]
        d_log_sum = torch.stack([grad.to(q.dtype).flatten() for grad in grads[reads:]])
        d_weights = torch.empty_like(weights)
        for i, block in enumerate(blocks):
            rows = flat_rows(block, q.dtype)
            for s, d_out in enumerate(d_mixed):
                torch.sum(d_out * rows, -1, out=d_weights[i, s])
        d_logits = weights * (d_weights - (weights * d_weights).sum(0) + d_log_sum)
        on_query = d_logits * inverse_rms * scale
        on_row = ((d_logits * logits).sum(1, keepdim=True) * inverse_rms.square() / -q.shape[-1]).transpose(1, 2)

        found: list[Tensor] = []
        d_q = torch.zeros_like(q)
        for i, block in enumerate(blocks):
            rows = flat_rows(block, q.dtype)
            if any(wanted[n:]):
                for s in range(reads):
                    d_q[s].addmv_(rows.t(), on_query[i, s])
            if wanted[i]:
                d_row = torch.mul(rows, on_row[i], out=q.new_empty(rows.shape))
                for s, d_out in enumerate(d_mixed):
                    d_row.addr_(on_query[i, s], q[s]).addcmul_(d_out, weights[i, s, :, None])
                found.append(d_row.to(block.dtype).view(block.shape))
        return found + vector_grads([row.clone() for row in d_q], queries, gains, wanted[n:])


def fake_forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    """Shapes and dtypes of what :func:`forward` returns."""
    check_reads(blocks, queries, gains)
    refuse_unsplit()
    first, arithmetic = blocks[0], compute_dtype(*blocks, *queries, *gains)
    mixed = [first.new_empty(first.shape, dtype=promoted_dtype(blocks)) for _ in queries]
    return [*mixed, *(first.new_empty((*first.shape[:-1], 1), dtype=arithmetic) for _ in queries)]


def fake_backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Shapes and dtypes of what :func:`backward` returns."""
    asked = zip((*blocks, *queries, *gains), wanted, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep the inputs for the backward."""
    blocks, queries, gains, *ctx.settings = inputs
    ctx.counts = len(blocks), len(queries), len(gains)
    ctx.outputs_like = [(tensor.shape, tensor.dtype) for tensor in output]
    ctx.save_for_backward(*blocks, *queries, *gains)


def differentiate(ctx: Any, grads: Sequence[Tensor | None], operator: Any) -> tuple[Any, ...]:
    """The gradients of the inputs, found by ``operator``; under ``create_graph`` by what is differentiable itself."""
    n, reads, _ = ctx.counts
    blocks, queries, gains = ctx.saved_tensors[:n], ctx.saved_tensors[n : n + reads], ctx.saved_tensors[n + reads :]
    # What nothing was computed from has no gradient.
    given = [
        blocks[0].new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip(grads, ctx.outputs_like, strict=True)
    ]
    wanted = [flag for flags in ctx.needs_input_grad[:3] for flag in flags]
    find: Any = expand_backward if torch.is_grad_enabled() else operator
    found = iter(find(given, list(blocks), list(queries), list(gains), *ctx.settings, wanted))
    by_input = [next(found) if want else None for want in wanted]
    return by_input[:n], by_input[n : n + reads], by_input[n + reads :], None, None


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return differentiate(ctx, grads, torch.ops.attnres.attend_blocks_backward)


def _register() -> None:
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", forward)
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", backward)
    torch.library.register_fake(_FORWARD, fake_forward)
    torch.library.register_fake(_BACKWARD, fake_backward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=setup_context)
    # Under a torch.func transform the op is its expansion, which vmap, grad and jvp see through.
    torch.library.impl(_FORWARD, "FuncTorchDynamicLayerFrontMode", expand_forward)

    ops = torch.ops.attnres
    register(ops.attend_blocks.default, expand_forward, fake_forward)
    register(ops.attend_blocks_backward.default, expand_backward, fake_backward)


_register()
