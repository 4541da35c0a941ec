"""``torch.ops.attnres.attend_blocks``: phase one of the two-phase schedule (arXiv:2603.15031, section 4).

Pseudo-queries do not depend on the input, so all S reads of a block can attend to the complete blocks before it in one
pass over them. For blocks ``v_i`` ``[..., D]``, queries ``w_s`` ``[D]`` and gains ``g_s`` ``[D]``::

    logit_si = scale * <w_s, v_i * rsqrt(mean(v_i^2, -1) + eps) * g_s>
    m_s      = sum_i softmax_i(logit_si) * v_i          mixed [..., D]
    l_s      = log sum_i exp(logit_si)                  log-sum [..., 1]

``merge_partial`` makes of each the result of its read. Inner arithmetic is float32, or float64 if any input is; ``m``
has the dtype of the blocks, ``l`` that of the arithmetic.

There are two expansions, because Inductor fuses differently on the two kinds of device. On a GPU the code is written
out for every read, and phase one is one kernel. On the CPU the S reads are a dimension of the scalars, ``[..., S, 1]``,
and what is as wide as a block, the S results and the gradients, is written out. docs/performance.md compares them with
other ways to write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops.arithmetic import (
    check_sources,
    compute_dtype,
    exponentials,
    flat_rows,
    folded_query,
    hints,
    inverse_rms_of,
    keep_in_memory,
    logits_of,
    promoted_dtype,
    query_grads,
    refuse_tangents,
    scores,
    softmax,
    sum_over_rows,
    weighted_sum,
)

_FORWARD, _BACKWARD = "attnres::attend_blocks", "attnres::attend_blocks_backward"
# No gains are an empty list. The result is the mixed of every read, then the log-sum of every read.
_INPUTS = "Tensor[] blocks, Tensor[] queries, Tensor[] gains, float eps, float scale"

torch.library.define(_FORWARD, f"({_INPUTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag per block, query and gain; only those gradients are returned.
torch.library.define(
    _BACKWARD, f"(Tensor[] grads, {_INPUTS}, bool[] wanted) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _check(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
    if len(queries) == 0:
        raise ValueError("attend_blocks: queries is empty; it needs one [D] for every read")
    if len(gains) not in (0, len(queries)):
        raise ValueError(f"attend_blocks: {len(gains)} gains for {len(queries)} queries; give one each, or none")
    vectors = [(f"queries[{s}]", query) for s, query in enumerate(queries)]
    check_sources("attend_blocks", blocks, *vectors, *((f"gains[{s}]", gain) for s, gain in enumerate(gains)))


def _each_gain(queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return gains if gains else [None] * len(queries)


def _folded_each(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> list[Tensor]:
    """Every query times its gain, in the dtype of the inner arithmetic."""
    dtype = compute_dtype(*blocks, *queries, *gains)
    pairs = zip(queries, _each_gain(queries, gains), strict=True)
    return [folded_query(query, gain, dtype) for query, gain in pairs]


def _folded_queries(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Queries times gains ``[S, D]``, in the dtype of the inner arithmetic."""
    return torch.stack(_folded_each(blocks, queries, gains))


# Expansions, for Inductor on a GPU and for differentiation: a copy of the code for every read, so that all of phase one
# is one kernel, which reads every block once.


def _expand_forward(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
) -> list[Tensor]:
    _check(blocks, queries, gains)
    q = _folded_each(blocks, queries, gains)
    wide, dtype = [block.to(q[0].dtype) for block in blocks], promoted_dtype(blocks)
    inverse_rms = inverse_rms_of(wide, eps)
    mixed, log_sums = [], []
    for of_read in q:
        peak, exps, denominator = exponentials(logits_of(wide, inverse_rms, of_read, scale))
        factor = 1.0 / denominator
        mixed.append(weighted_sum(wide, [exp * factor for exp in exps]).to(dtype).contiguous())
        log_sums.append(peak + torch.log(denominator))
    return [*mixed, *log_sums]


def _expand_backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    n, reads = len(blocks), len(queries)
    q = _folded_each(blocks, queries, gains)
    dtype = q[0].dtype
    wide = [block.to(dtype) for block in blocks]
    d_mixed, d_log_sums = ([grad.to(dtype) for grad in part] for part in (grads[:reads], grads[reads:]))
    inverse_rms = inverse_rms_of(wide, eps)
    logits = [logits_of(wide, inverse_rms, of_read, scale) for of_read in q]
    weights = [softmax(of_read, 1.0) for of_read in logits]
    d_logits = []
    for weight, d_out, d_log_sum in zip(weights, d_mixed, d_log_sums, strict=True):
        d_weight = [(d_out * v).sum(-1, keepdim=True) for v in wide]
        # A logit changes m by its block, against the mean over the blocks, and l by its weight.
        mean = weighted_sum(d_weight, weight) - d_log_sum
        d_logits.append([w * (d - mean) for w, d in zip(weight, d_weight, strict=True)])
    on_query = [[d * inv * scale for d, inv in zip(row, inverse_rms, strict=True)] for row in d_logits]

    found: list[Tensor] = []
    for i, block in enumerate(blocks):
        if wanted[i]:
            d_row = weighted_sum(d_mixed, [weight[i] for weight in weights])
            for of_read, on in zip(q, on_query, strict=True):
                d_row = d_row + of_read * on[i]
            on_row = weighted_sum([d[i] for d in d_logits], [logit[i] for logit in logits])
            d_row = d_row - wide[i] * (on_row * inverse_rms[i].square() / block.shape[-1])
            found.append(d_row.to(block.dtype).contiguous())
    if any(wanted[n:]):
        stored_as = promoted_dtype(blocks) if for_inductor else None
        d_q = [sum_over_rows(weighted_sum(wide, on), stored_as) for on in on_query]
        found += _vector_grads(d_q, queries, gains, wanted[n:])
    return found


# Expansions for Inductor on the CPU: the reads are a dimension of the scalars, which are loop nests of their own there.


def _rows(blocks: Sequence[Tensor], q: Tensor) -> list[Tensor]:
    """Every block as ``[..., S, D]``, expanded and not copied."""
    return [block.to(q.dtype).unsqueeze(-2).expand(*block.shape[:-1], *q.shape) for block in blocks]


def _expand_forward_on_cpu(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
) -> list[Tensor]:
    _check(blocks, queries, gains)
    row_by_row, stored = hints(True, blocks[0].device)
    q = _folded_queries(blocks, queries, gains)
    rows = _rows(blocks, q)
    logits = [row_by_row(logit) for logit in scores(rows, q, eps, scale)[1]]
    peak, exps, denominator = exponentials(logits)
    factor = row_by_row(1.0 / denominator)
    weights = [stored(exp * factor) for exp in exps]
    wide = [block.to(q.dtype) for block in blocks]
    mixed = [weighted_sum(wide, [w.select(-2, s) for w in weights]) for s in range(len(queries))]
    # Kept, so that what merges it does not compute it again, in a kernel that depends on the number of blocks.
    log_sum = stored(peak + torch.log(denominator))
    dtype = promoted_dtype(blocks)
    return [*(m.to(dtype).contiguous() for m in mixed), *log_sum.unbind(-2)]


def _expand_backward_on_cpu(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    row_by_row, stored = hints(True, blocks[0].device)
    n, reads = len(blocks), len(queries)
    q = _folded_queries(blocks, queries, gains)
    rows, wide = _rows(blocks, q), [block.to(q.dtype) for block in blocks]
    d_mixed = [grad.to(q.dtype) for grad in grads[:reads]]
    d_log_sum = torch.stack([grad.to(q.dtype) for grad in grads[reads:]], -2)
    inverse_rms, logits = scores(rows, q, eps, scale)
    logits = [row_by_row(logit) for logit in logits]
    weights = softmax(logits, 1.0, row_by_row)
    d_weights = [torch.stack([(d * v).sum(-1, keepdim=True) for d in d_mixed], -2) for v in wide]
    # A logit changes m by its block, against the mean over the blocks, and l by its weight.
    mean = row_by_row(weighted_sum(d_weights, weights) - d_log_sum)
    d_logits = [weight * (d_weight - mean) for weight, d_weight in zip(weights, d_weights, strict=True)]
    on_query = [stored(d * inv * scale) for d, inv in zip(d_logits, inverse_rms, strict=True)]

    found: list[Tensor] = []
    for i, block in enumerate(blocks):
        if wanted[i]:
            on_row = stored(d_logits[i] * logits[i] * inverse_rms[i].square() / q.shape[-1])
            weight = stored(weights[i])
            # The sum over the reads is written out: as a reduction it would be a loop, and a kernel, of its own.
            terms = [d_mixed[s] * weight.select(-2, s) + q[s] * on_query[i].select(-2, s) for s in range(reads)]
            d_row = sum(terms[1:], terms[0]) - wide[i] * on_row.sum(-2)
            found.append(d_row.to(block.dtype).contiguous())
    if any(wanted[n:]):
        d_q = []
        for s in range(reads):
            d_rows = weighted_sum(wide, [scalar.select(-2, s) for scalar in on_query]).reshape(-1, q.shape[-1])
            # This reduction runs over rows, in a loop of its own: let it read one tensor, not every block again.
            d_q.append(keep_in_memory(d_rows).sum(0))
        found += _vector_grads(d_q, queries, gains, wanted[n:])
    return found


def _vector_grads(
    d_q: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """The wanted gradients of the queries, then those of the gains, from ``d_q``, a ``[D]`` for every read."""
    on_gains = wanted[len(queries) :] or [False] * len(queries)
    by_query: list[Tensor] = []
    by_gain: list[Tensor] = []
    for s, (query, gain) in enumerate(zip(queries, _each_gain(queries, gains), strict=True)):
        by_query += query_grads(d_q[s], query, gain, (wanted[s], False))
        by_gain += query_grads(d_q[s], query, gain, (False, on_gains[s]))
    return by_query + by_gain


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


def _forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    _check(blocks, queries, gains)
    refuse_tangents("attend_blocks", *blocks, *queries, *gains)
    shape = blocks[0].shape
    with torch.autocast(blocks[0].device.type, enabled=False):
        q = _folded_queries(blocks, queries, gains)
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


def _backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    refuse_tangents("attend_blocks_backward", *grads, *blocks, *queries, *gains)
    n, reads = len(blocks), len(queries)
    with torch.autocast(blocks[0].device.type, enabled=False):
        q = _folded_queries(blocks, queries, gains)
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
        return found + _vector_grads([row.clone() for row in d_q], queries, gains, wanted[n:])


def _fake_forward(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    _check(blocks, queries, gains)
    first, arithmetic = blocks[0], compute_dtype(*blocks, *queries, *gains)
    mixed = [first.new_empty(first.shape, dtype=promoted_dtype(blocks)) for _ in queries]
    return [*mixed, *(first.new_empty((*first.shape[:-1], 1), dtype=arithmetic) for _ in queries)]


def _fake_backward(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    asked = zip((*blocks, *queries, *gains), wanted, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    blocks, queries, gains, *ctx.settings = inputs
    ctx.counts = len(blocks), len(queries), len(gains)
    ctx.outputs_like = [(tensor.shape, tensor.dtype) for tensor in output]
    ctx.save_for_backward(*blocks, *queries, *gains)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    n, reads, _ = ctx.counts
    blocks, queries, gains = ctx.saved_tensors[:n], ctx.saved_tensors[n : n + reads], ctx.saved_tensors[n + reads :]
    # What nothing was computed from has no gradient.
    given = [
        blocks[0].new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip(grads, ctx.outputs_like, strict=True)
    ]
    wanted = [flag for flags in ctx.needs_input_grad[:3] for flag in flags]
    # Under create_graph the gradients must be differentiable themselves.
    differentiable = torch.is_grad_enabled()
    backward: Any = _expand_backward if differentiable else torch.ops.attnres.attend_blocks_backward
    found = iter(backward(given, list(blocks), list(queries), list(gains), *ctx.settings, wanted))
    by_input = [next(found) if want else None for want in wanted]
    return by_input[:n], by_input[n : n + reads], by_input[n + reads :], None, None


def _lower_forward(blocks: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    expand = _expand_forward_on_cpu if blocks[0].device.type == "cpu" else _expand_forward
    return expand(blocks, *rest)


def _lower_backward(grads: Sequence[Tensor], blocks: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    if blocks[0].device.type == "cpu":
        return _expand_backward_on_cpu(grads, blocks, *rest)
    return _expand_backward(grads, blocks, *rest, for_inductor=True)


def _register() -> None:
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
    # Under a torch.func transform the op is its expansion, which vmap, grad and jvp see through.
    torch.library.impl(_FORWARD, "FuncTorchDynamicLayerFrontMode", _expand_forward)

    ops = torch.ops.attnres
    register_inductor_decomposition(ops.attend_blocks.default, _lower_forward)
    register_inductor_decomposition(ops.attend_blocks_backward.default, _lower_backward)


_register()
