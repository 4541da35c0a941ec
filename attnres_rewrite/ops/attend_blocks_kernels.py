"""The Triton kernels of phase one; ``attend_blocks_triton.py`` launches them, ``attend_blocks.py`` has the equations.

In all of them ``D`` are the columns of a tile, a power of two; ``COUNT`` is the length of the tuples of pointers, of
which only the first few are other tensors. What there is one of for every read is a tuple, rebuilt where it changes.
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
def score(
    blocks,
    keys,
    d_mixed,
    d_log_sums,
    logits,
    log_sums,
    d_weights,
    means,
    inverse,
    n,
    width,
    eps,
    scale,
    COUNT: tl.constexpr,
    READS: tl.constexpr,
    D: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Logits ``[rows, n, READS]`` and log-sums ``[rows, READS]`` of ``n`` blocks, a row a program.

    In the backward, too, the gradients of the weights, their mean with that of the log-sum taken off, and the inverse
    RMS of every block ``[rows, n]``. A program is one warp and ``D`` columns what it loads at once: none of the many
    sums over a row has to wait for another warp.
    """
    row = tl.program_id(0).to(tl.int64)
    peak, total, mean = (-float("inf"),) * READS, (0.0,) * READS, (0.0,) * READS
    for i in range(n):
        block = _pick(blocks, i, COUNT) + row * width
        squares = tl.zeros([D], tl.float32)
        dots, d_dots = (squares,) * READS, (squares,) * READS
        for first in tl.range(0, width, D, loop_unroll_factor=2 if BACKWARD else 4):
            columns = first + tl.arange(0, D)
            inside = columns < width
            value = tl.load(block + columns, inside, other=0.0).to(tl.float32)
            squares += value * value
            more, d_more = (), ()
            for s in tl.static_range(READS):
                more = more + (dots[s] + value * tl.load(keys + s * width + columns, inside, other=0.0),)
                if BACKWARD:
                    d_out = tl.load(d_mixed[s] + row * width + columns, inside, other=0.0).to(tl.float32)
                    d_more = d_more + (d_dots[s] + value * d_out,)
                else:
                    d_more = d_more + (squares,)
            dots, d_dots = more, d_more
        inverse_rms = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        if BACKWARD:
            tl.store(inverse + row * n + i, inverse_rms)
        higher, totals, mean_so_far = (), (), ()
        for s in tl.static_range(READS):
            at = (row * n + i) * READS + s
            logit = tl.sum(dots[s], 0) * (inverse_rms * scale)
            tl.store(logits + at, logit)
            high = tl.maximum(peak[s], logit)
            fading, weight = tl.exp(peak[s] - high), tl.exp(logit - high)
            higher, totals = higher + (high,), totals + (total[s] * fading + weight,)
            if BACKWARD:
                d_weight = tl.sum(d_dots[s], 0)
                tl.store(d_weights + at, d_weight)
                mean_so_far = mean_so_far + (mean[s] * fading + weight * d_weight,)
            else:
                mean_so_far = mean_so_far + (mean[s],)
        peak, total, mean = higher, totals, mean_so_far
    for s in tl.static_range(READS):
        tl.store(log_sums + row * READS + s, peak[s] + tl.log(total[s]))
        if BACKWARD:
            # A logit changes the mixed by its block, against the mean over the blocks, and the log-sum by its weight.
            tl.store(means + row * READS + s, mean[s] / total[s] - tl.load(d_log_sums[s] + row))


@triton.jit
def mix(
    blocks,
    logits,
    log_sums,
    mixed,
    outputs,
    n,
    rows,
    width,
    COUNT: tl.constexpr,
    READS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """Mixed of ``READS`` reads, and log-sums, from :func:`score`; ``R`` rows and ``D`` columns a program."""
    columns = tl.program_id(1) * D + tl.arange(0, D)
    inside = columns < width
    first = tl.program_id(0).to(tl.int64) * R
    for row in range(first, tl.minimum(first + R, rows)):
        at = row * width + columns
        sums = (tl.zeros([D], tl.float32),) * READS
        for i in tl.range(0, n, loop_unroll_factor=4):
            value = tl.load(_pick(blocks, i, COUNT) + at, inside, other=0.0).to(tl.float32)
            more = ()
            for s in tl.static_range(READS):
                weight = tl.exp(tl.load(logits + (row * n + i) * READS + s) - tl.load(log_sums + row * READS + s))
                more = more + (sums[s] + weight * value,)
            sums = more
        for s in tl.static_range(READS):
            tl.store(mixed[s] + at, sums[s].to(mixed[s].dtype.element_ty), inside)
            if tl.program_id(1) == 0:
                tl.store(outputs[s] + row, tl.load(log_sums + row * READS + s))


@triton.jit
def differentiate(
    blocks,
    keys,
    d_mixed,
    logits,
    log_sums,
    d_weights,
    means,
    inverse,
    added,
    d_blocks,
    d_keys,
    n,
    total_reads,
    add,
    want,
    rows,
    of_program,
    width,
    scale,
    COUNT: tl.constexpr,
    READS: tl.constexpr,
    D: tl.constexpr,
    WANT_QUERIES: tl.constexpr,
):
    """Gradients of ``n`` blocks, and of ``READS`` keys summed over the ``of_program`` rows of a program.

    From :func:`score`; ``D`` columns a program. ``add`` and ``want`` have a bit for every block: whether something is
    added to its gradient, and whether that is wanted.
    """
    columns = tl.program_id(1) * D + tl.arange(0, D)
    inside = columns < width
    key, d_key = (), (tl.zeros([D], tl.float32),) * READS
    for s in tl.static_range(READS):
        key = key + (tl.load(keys + s * width + columns, inside, other=0.0),)
    first = tl.program_id(0).to(tl.int64) * of_program
    for row in range(first, tl.minimum(first + of_program, rows)):
        at = row * width + columns
        d_out = ()
        for s in tl.static_range(READS):
            d_out = d_out + (tl.load(d_mixed[s] + at, inside, other=0.0).to(tl.float32),)
        for i in tl.range(0, n, loop_unroll_factor=2):
            value = tl.load(_pick(blocks, i, COUNT) + at, inside, other=0.0).to(tl.float32)
            inverse_rms = tl.load(inverse + row * n + i)
            d_value, on_row, d_more = tl.zeros([D], tl.float32), 0.0, ()
            for s in tl.static_range(READS):
                of_block, of_row = (row * n + i) * READS + s, row * READS + s
                logit = tl.load(logits + of_block)
                weight = tl.exp(logit - tl.load(log_sums + of_row))
                d_logit = weight * (tl.load(d_weights + of_block) - tl.load(means + of_row))
                on_query = d_logit * (inverse_rms * scale)
                on_row += d_logit * logit
                d_value += weight * d_out[s] + on_query * key[s]
                d_more = d_more + (d_key[s] + on_query * value,)
            d_key = d_more
            if (want >> i) & 1:
                d_value -= on_row * inverse_rms * inverse_rms / width * value
                if (add >> i) & 1:
                    d_value += tl.load(_pick(added, i, COUNT) + at, inside, other=0.0).to(tl.float32)
                out = _pick(d_blocks, i, COUNT)
                tl.store(out + at, d_value.to(out.dtype.element_ty), inside)
    if WANT_QUERIES:
        own = d_keys + tl.program_id(0).to(tl.int64) * total_reads * width
        for s in tl.static_range(READS):
            tl.store(own + s * width + columns, d_key[s], inside)
