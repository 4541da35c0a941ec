"""What Inductor makes kernels of instead of calling ``torch.ops.attnres.block_attn_res``.

Being made of differentiable operators, the expansions are also what ``torch.func`` transforms and double backward use.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnres_rewrite.ops.arithmetic import (
    as_stored,
    check_gate,
    check_sources,
    coefficients,
    compute_dtype,
    folded_query,
    hints,
    keep_in_memory,
    promoted_dtype,
    query_grads,
    scores,
    softmax,
    sum_over_rows,
    weighted_sum,
)


def check(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, gate: Tensor | None = None) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` unless these are arguments of ``block_attn_res``."""
    check_sources("block_attn_res", sources, ("query", query), ("gain", gain))
    check_gate("block_attn_res", gate)


def folded(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, gate: Tensor | None = None) -> Tensor:
    """Query times gain ``[D]``, in the dtype of the inner arithmetic."""
    return folded_query(query, gain, compute_dtype(*sources, query, gain, gate))


def in_compute_dtype(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, gate: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The sources, and query times gain, in the dtype of the inner arithmetic."""
    q = folded(sources, query, gain, gate)
    return [source.to(q.dtype) for source in sources], q


def expand_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    gate: Tensor | None = None,
    base: float = 0.0,
    value_norm: bool = False,
    *,
    for_inductor: bool = False,
) -> Tensor:
    """The read; ``for_inductor`` with hints that change no value."""
    check(sources, query, gain, gate)
    row_by_row, stored = hints(for_inductor, sources[0].device)
    rows, q = in_compute_dtype(sources, query, gain, gate)
    inverse_rms, logits = scores(rows, q, eps, scale)
    weights = softmax([row_by_row(logit) for logit in logits], float(len(rows)) if sum_ else 1.0, row_by_row)
    factors = coefficients(weights, inverse_rms if value_norm else None, gate, base)
    out = weighted_sum(rows, [stored(factor) for factor in factors])
    return as_stored(out, promoted_dtype(sources), for_inductor)


def expand_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
    gate: Tensor | None = None,
    base: float = 0.0,
    value_norm: bool = False,
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    """The gradients that are ``wanted``, in the order of the inputs."""
    row_by_row, stored = hints(for_inductor, sources[0].device)
    n, total = len(sources), float(len(sources)) if sum_ else 1.0
    rows, q = in_compute_dtype(sources, query, gain, gate)
    d_out = grad.to(q.dtype)
    inverse_rms, logits = scores(rows, q, eps, scale)
    logits = [row_by_row(logit) for logit in logits]
    weights = softmax(logits, total, row_by_row)
    factors = coefficients(weights, inverse_rms if value_norm else None, gate, base)
    d_factors = [(d_out * row).sum(-1, keepdim=True) for row in rows]
    d_weights = d_factors if gate is None else [d * gate.to(q.dtype) for d in d_factors]
    if value_norm:
        d_weights = [d * inv for d, inv in zip(d_weights, inverse_rms, strict=True)]
    mean = row_by_row(weighted_sum(d_weights, weights) / total)
    d_logits = [weight * (d_weight - mean) for weight, d_weight in zip(weights, d_weights, strict=True)]
    on_query = [stored(d * inv * scale) for d, inv in zip(d_logits, inverse_rms, strict=True)]

    grads: list[Tensor] = []
    for i, source in enumerate(sources):
        if wanted[i]:
            on_norm = d_logits[i] * logits[i]
            if value_norm:
                on_norm = on_norm + d_weights[i] * weights[i]
            on_row = stored(on_norm * inverse_rms[i].square() / q.shape[0])
            d_row = d_out * stored(factors[i]) + on_query[i] * q - rows[i] * on_row
            grads.append(as_stored(d_row, source.dtype, for_inductor))
    if any(wanted[n : n + 2]):
        d_rows = weighted_sum(rows, on_query)
        if for_inductor and d_rows.device.type != "cpu":
            d_q = sum_over_rows(d_rows, promoted_dtype(sources))
        else:
            d_rows = d_rows.reshape(-1, q.shape[0])
            # This reduction runs over rows and has a loop of its own: let it read one tensor, not every source again.
            # (Measured, too: a matrix-vector product or a reduction per source, both slower in all.)
            d_q = (keep_in_memory(d_rows) if for_inductor and n > 2 else d_rows).sum(0)
        grads += query_grads(d_q, query, gain, wanted[n:])
    if gate is not None and wanted[n + 2]:
        # As if the gate were one.
        ungated = coefficients(weights, inverse_rms if value_norm else None, None, base - 1.0)
        grads.append(weighted_sum(d_factors, ungated).sum().reshape(1).to(gate.dtype))
    return grads
