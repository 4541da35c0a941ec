"""The Triton kernels of phase one; ``attend_blocks_triton.py`` launches them, ``attend_blocks.py`` has the equations.

In all of them ``S`` and ``D`` are the reads of a program and the width ``width``, padded to powers of two; ``COUNT`` is
the length of the tuples of pointers, of which only the first few are other tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pick(tensors, i, COUNT: tl.constexpr):
    """``tensors[i]`` of a tuple of pointers, for an ``i`` that is not known when this is compiled."""
    found = tensors[0]
    for j in tl.static_range(1, COUNT):
        found = tl.where(i == j, tensors[j], found)
    return found


@triton.jit
def fold(queries, gains, keys, width, COUNT: tl.constexpr, GAINS: tl.constexpr, D: tl.constexpr):
    """Queries times gains ``[S, width]``; a program a read and ``D`` columns."""
    read, columns = tl.program_id(1), tl.program_id(0) * D + tl.arange(0, D)
    inside = columns < width
    key = tl.load(_pick(queries, read, COUNT) + columns, inside).to(tl.float32)
    if GAINS:
        key *= tl.load(_pick(gains, read, COUNT) + columns, inside).to(tl.float32)
    tl.store(keys + read * width + columns, key, inside)


@triton.jit
def unfold(
    d_keys,
    queries,
    gains,
    d_queries,
    d_gains,
    parts,
    reads,
    width,
    COUNT: tl.constexpr,
    GAINS: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of queries and gains from ``parts`` parts ``[parts, reads, width]`` of that of their product."""
    read, columns = tl.program_id(1), tl.program_id(0) * D + tl.arange(0, D)
    inside = columns < width
    sums = tl.zeros([P, D], tl.float32)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)
        at = (part[:, None] * reads + read) * width + columns[None, :]
        sums += tl.load(d_keys + at, (part < parts)[:, None] & inside[None, :], other=0.0)
    d_query = tl.sum(sums, 0)
    if GAINS:
        of_gain = _pick(d_gains, read, COUNT)
        query = tl.load(_pick(queries, read, COUNT) + columns, inside).to(tl.float32)
        tl.store(of_gain + columns, (d_query * query).to(of_gain.dtype.element_ty), inside)
        d_query *= tl.load(_pick(gains, read, COUNT) + columns, inside).to(tl.float32)
    of_query = _pick(d_queries, read, COUNT)
    tl.store(of_query + columns, d_query.to(of_query.dtype.element_ty), inside)


@triton.jit
def _add_each(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def attend(
    blocks,
    keys,
    mixed,
    log_sums,
    n,
    width,
    eps,
    scale,
    COUNT: tl.constexpr,
    READS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
):
    """Mixed and log-sums of ``READS`` reads of ``n`` blocks, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    reads, columns = tl.arange(0, S), tl.arange(0, D)
    inside = columns < width
    both = (reads < READS)[:, None] & inside[None, :]
    at = row * width + columns
    key = tl.load(keys + reads[:, None] * width + columns[None, :], both, other=0.0)
    peak = tl.full([S], -float("inf"), tl.float32)
    total = tl.zeros([S], tl.float32)
    sums = tl.zeros([S, D], tl.float32)
    # Asked for two blocks ahead, so that they arrive while the sums over a row are taken.
    following = tl.load(blocks[0] + at, inside, other=0.0)
    second = tl.load(blocks[1] + at, inside & (n > 1), other=0.0)
    for i in range(n):
        value = following.to(tl.float32)[None, :]
        following = second
        second = tl.load(_pick(blocks, i + 2, COUNT) + at, inside & (i + 2 < n), other=0.0)
        # One reduction for both sums: its latency is what a block costs.
        squares = tl.broadcast_to(value * value, [S, D])
        dots, squares = tl.reduce((key * value, squares), 1, _add_each)
        logit = dots * tl.rsqrt(squares / width + eps) * scale
        higher = tl.maximum(peak, logit)
        fading, weight = tl.exp(peak - higher), tl.exp(logit - higher)
        sums = sums * fading[:, None] + weight[:, None] * value
        total = total * fading + weight
        peak = higher
    sums = sums / total[:, None]
    log_sum = peak + tl.log(total)
    for s in tl.static_range(READS):
        of_read = tl.sum(tl.where(reads[:, None] == s, sums, 0.0), 0)
        tl.store(mixed[s] + at, of_read.to(mixed[s].dtype.element_ty), inside)
        tl.store(log_sums[s] + row, tl.sum(tl.where(reads == s, log_sum, 0.0), 0))


@triton.jit
def attend_backward(
    blocks,
    keys,
    d_mixed,
    d_log_sums,
    added,
    d_blocks,
    d_keys,
    n,
    total_reads,
    add,
    want,
    rows,
    width,
    eps,
    scale,
    COUNT: tl.constexpr,
    READS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    WANT_QUERIES: tl.constexpr,
):
    """Gradients of ``n`` blocks, and of ``READS`` keys summed over the rows of a program.

    ``add`` and ``want`` have a bit for every block: whether something is added to its gradient, and whether that is
    wanted.
    """
    reads, columns = tl.arange(0, S), tl.arange(0, D)
    inside = columns < width
    both = (reads < READS)[:, None] & inside[None, :]
    of_keys = keys + reads[:, None] * width + columns[None, :]
    d_key = tl.zeros([S, D], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, rows, tl.num_programs(0)):
        at = row * width + columns
        d_out = tl.zeros([S, D], d_mixed[0].dtype.element_ty)
        d_log_sum = tl.zeros([S], tl.float32)
        for s in tl.static_range(READS):
            of_read = tl.load(d_mixed[s] + at, inside, other=0.0)
            d_out = tl.where(reads[:, None] == s, of_read[None, :], d_out)
            d_log_sum = tl.where(reads == s, tl.load(d_log_sums[s] + row), d_log_sum)
        peak = tl.full([S], -float("inf"), tl.float32)
        total = tl.zeros([S], tl.float32)
        mean = tl.zeros([S], tl.float32)
        for i in range(n):
            value = tl.load(_pick(blocks, i, COUNT) + at, inside, other=0.0).to(tl.float32)[None, :]
            key = tl.load(of_keys, both, other=0.0)
            squares = tl.broadcast_to(value * value, [S, D])
            dots, squares, d_weight = tl.reduce((key * value, squares, d_out.to(tl.float32) * value), 1, _add_three)
            logit = dots * tl.rsqrt(squares / width + eps) * scale
            higher = tl.maximum(peak, logit)
            fading, weight = tl.exp(peak - higher), tl.exp(logit - higher)
            mean = mean * fading + weight * d_weight
            total = total * fading + weight
            peak = higher
        # A logit changes the mixed by its block, against the mean over the blocks, and the log-sum by its weight.
        mean = mean / total - d_log_sum
        for i in range(n):
            value = tl.load(_pick(blocks, i, COUNT) + at, inside, other=0.0).to(tl.float32)[None, :]
            key = tl.load(of_keys, both, other=0.0)
            squares = tl.broadcast_to(value * value, [S, D])
            dots, squares, d_weight = tl.reduce((key * value, squares, d_out.to(tl.float32) * value), 1, _add_three)
            inverse_rms = tl.rsqrt(squares / width + eps)
            logit = dots * inverse_rms * scale
            weight = tl.exp(logit - peak) / total
            d_logit = weight * (d_weight - mean)
            on_query = d_logit * inverse_rms * scale
            if WANT_QUERIES:
                d_key += on_query[:, None] * value
            if (want >> i) & 1:
                on_row = d_logit * logit * inverse_rms * inverse_rms / width
                terms = weight[:, None] * d_out.to(tl.float32) + on_query[:, None] * key - on_row[:, None] * value
                d_value = tl.sum(terms, 0)
                if (add >> i) & 1:
                    d_value += tl.load(_pick(added, i, COUNT) + at, inside, other=0.0).to(tl.float32)
                out = _pick(d_blocks, i, COUNT)
                tl.store(out + at, d_value.to(out.dtype.element_ty), inside)
    if WANT_QUERIES:
        own = d_keys + first * total_reads * width
        tl.store(own + reads[:, None] * width + columns[None, :], d_key, both)
