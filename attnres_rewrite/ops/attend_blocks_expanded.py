"""What Inductor makes kernels of instead of calling ``torch.ops.attnres.attend_blocks``; there the equations are.

There are two expansions, because Inductor fuses differently on the two kinds of device. On a GPU the code is written
out for every read, and phase one is one kernel. On the CPU the S reads are a dimension of the scalars, ``[..., S, 1]``,
and what is as wide as a block, the S results and the gradients, is written out. docs/performance.md compares them with
other ways to write it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.ops.arithmetic import (
    as_stored,
    check_sources,
    compute_dtype,
    exponentials,
    folded_query,
    hints,
    inverse_rms_of,
    keep_in_memory,
    logits_of,
    promoted_dtype,
    query_grads,
    scores,
    softmax,
    sum_over_rows,
    weighted_sum,
)


def check_reads(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
    """Raise :class:`ValueError` unless these are the arguments of ``attend_blocks``."""
    if len(queries) == 0:
        raise ValueError("attend_blocks: queries is empty; it needs one [D] for every read")
    if len(gains) not in (0, len(queries)):
        raise ValueError(f"attend_blocks: {len(gains)} gains for {len(queries)} queries; give one each, or none")
    vectors = [(f"queries[{s}]", query) for s, query in enumerate(queries)]
    check_sources("attend_blocks", blocks, *vectors, *((f"gains[{s}]", gain) for s, gain in enumerate(gains)))


def each_gain(queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gain of every query, which may be none."""
    return gains if gains else [None] * len(queries)


def folded_each(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> list[Tensor]:
    """Every query times its gain, in the dtype of the inner arithmetic."""
    dtype = compute_dtype(*blocks, *queries, *gains)
    pairs = zip(queries, each_gain(queries, gains), strict=True)
    return [folded_query(query, gain, dtype) for query, gain in pairs]


def folded_queries(blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Queries times gains ``[S, D]``, in the dtype of the inner arithmetic."""
    return torch.stack(folded_each(blocks, queries, gains))


def vector_grads(
    d_q: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """The wanted gradients of the queries, then those of the gains, from ``d_q``, a ``[D]`` for every read."""
    on_gains = wanted[len(queries) :] or [False] * len(queries)
    by_query: list[Tensor] = []
    by_gain: list[Tensor] = []
    for s, (query, gain) in enumerate(zip(queries, each_gain(queries, gains), strict=True)):
        by_query += query_grads(d_q[s], query, gain, (wanted[s], False))
        by_gain += query_grads(d_q[s], query, gain, (False, on_gains[s]))
    return by_query + by_gain


# Expansions, for Inductor on a GPU and for differentiation: a copy of the code for every read, so that all of phase one
# is one kernel, which reads every block once.


def expand_forward(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    """Mixed of every read, then log-sum of every read."""
    check_reads(blocks, queries, gains)
    q = folded_each(blocks, queries, gains)
    wide, dtype = [block.to(q[0].dtype) for block in blocks], promoted_dtype(blocks)
    inverse_rms = inverse_rms_of(wide, eps)
    mixed, log_sums = [], []
    for of_read in q:
        peak, exps, denominator = exponentials(logits_of(wide, inverse_rms, of_read, scale))
        factor = 1.0 / denominator
        mixed.append(as_stored(weighted_sum(wide, [exp * factor for exp in exps]), dtype, for_inductor))
        log_sums.append(peak + torch.log(denominator))
    return [*mixed, *log_sums]


def expand_backward(
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
    """The gradients that are ``wanted``, in the order of the inputs."""
    n, reads = len(blocks), len(queries)
    q = folded_each(blocks, queries, gains)
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
            found.append(as_stored(d_row, block.dtype, for_inductor))
    if any(wanted[n:]):
        stored_as = promoted_dtype(blocks) if for_inductor else None
        d_q = [sum_over_rows(weighted_sum(wide, on), stored_as) for on in on_query]
        found += vector_grads(d_q, queries, gains, wanted[n:])
    return found


# Expansions for Inductor on the CPU: the reads are a dimension of the scalars, which are loop nests of their own there.


def _rows(blocks: Sequence[Tensor], q: Tensor) -> list[Tensor]:
    """Every block as ``[..., S, D]``, expanded and not copied."""
    return [block.to(q.dtype).unsqueeze(-2).expand(*block.shape[:-1], *q.shape) for block in blocks]


def expand_forward_on_cpu(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
) -> list[Tensor]:
    """Mixed of every read, then log-sum of every read."""
    check_reads(blocks, queries, gains)
    row_by_row, stored = hints(True, blocks[0].device)
    q = folded_queries(blocks, queries, gains)
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


def expand_backward_on_cpu(
    grads: Sequence[Tensor],
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    eps: float,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are ``wanted``, in the order of the inputs."""
    row_by_row, stored = hints(True, blocks[0].device)
    n, reads = len(blocks), len(queries)
    q = folded_queries(blocks, queries, gains)
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
        found += vector_grads(d_q, queries, gains, wanted[n:])
    return found
