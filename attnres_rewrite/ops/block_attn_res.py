"""``torch.ops.attnres.block_attn_res``: attention of a pseudo-query over the sources of a residual stream.

Equation (arXiv:2603.15031, Block AttnRes), for sources ``v_i`` ``[..., D]``, query ``w`` ``[D]``, gain ``g`` ``[D]``::

    logit_i = scale * <w, v_i * rsqrt(mean(v_i^2, -1) + eps) * g>
    alpha   = softmax over the sources i
    h       = sum_i alpha_i * v_i          (times the number of sources with sum=True)

Inner arithmetic is float32, or float64 if any input is; the result has the sources' promoted dtype.

Query and gain are first folded into ``q = w * g``, so a row of a source is touched by two dot products, with
itself and with ``q``, and by one weighted addition. No form stacks the sources. Autograd saves the inputs alone and
the backward computes inverse RMS and logits again; compiled, the partitioner keeps those of the forward.

The op exists in two forms. The *kernels* run in eager mode, source by source. The *expansions* are what Inductor
fuses with its neighbours and, being made of differentiable operators, what ``torch.func`` transforms and double
backward use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops.arithmetic import (
    check_sources,
    compute_dtype,
    flat_rows,
    folded_query,
    hints,
    keep_in_memory,
    promoted_dtype,
    query_grads,
    refuse_tangents,
    scores,
    softmax,
    sum_over_rows,
    weighted_sum,
)
from attnres_rewrite.ops.decomposition_table import register
from attnres_rewrite.ops.pipelining import refuse_unsplit

_FORWARD = "attnres::block_attn_res"
_BACKWARD = "attnres::block_attn_res_backward"
_INPUTS = "Tensor[] sources, Tensor query, Tensor? gain, float eps, float scale, bool sum"

torch.library.define(_FORWARD, f"({_INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag per source, one for the query and one for the gain; only those gradients are returned.
torch.library.define(
    _BACKWARD, f"(Tensor grad, {_INPUTS}, bool[] wanted) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def depth_weights(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None = None, *, eps: float = 1e-6, scale: float = 1.0
) -> Tensor:
    """The depth weights alpha alone.

    Args:
        sources: n tensors of one shape ``[..., D]``, floating point.
        query: pseudo-query ``[D]``.
        gain: key gain ``[D]``, or None for ones.
        eps: added to the mean square of a row.
        scale: factor on the logits.

    Returns:
        ``[n, ...]`` float32, non-negative, summing to one over the first dimension.
    """
    _check(sources, query, gain)
    rows, q = _in_compute_dtype(sources, query, gain)
    logits = torch.stack([logit.squeeze(-1) for logit in scores(rows, q, eps, scale)[1]])
    return torch.softmax(logits, 0).to(torch.float32)


def _check(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> None:
    check_sources("block_attn_res", sources, ("query", query), ("gain", gain))


def _folded_query(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> Tensor:
    return folded_query(query, gain, compute_dtype(*sources, query, gain))


def _in_compute_dtype(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> tuple[list[Tensor], Tensor]:
    q = _folded_query(sources, query, gain)
    return [source.to(q.dtype) for source in sources], q


# Expansions, for Inductor and for differentiation.


def _expand_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    *,
    for_inductor: bool = False,
) -> Tensor:
    _check(sources, query, gain)
    row_by_row, stored = hints(for_inductor, sources[0].device)
    rows, q = _in_compute_dtype(sources, query, gain)
    logits = [row_by_row(logit) for logit in scores(rows, q, eps, scale)[1]]
    weights = softmax(logits, float(len(rows)) if sum_ else 1.0, row_by_row)
    out = weighted_sum(rows, [stored(weight) for weight in weights])
    return out.to(promoted_dtype(sources)).contiguous()


def _expand_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    row_by_row, stored = hints(for_inductor, sources[0].device)
    n, total = len(sources), float(len(sources)) if sum_ else 1.0
    rows, q = _in_compute_dtype(sources, query, gain)
    d_out = grad.to(q.dtype)
    inverse_rms, logits = scores(rows, q, eps, scale)
    logits = [row_by_row(logit) for logit in logits]
    weights = softmax(logits, total, row_by_row)
    d_weights = [(d_out * row).sum(-1, keepdim=True) for row in rows]
    mean = row_by_row(weighted_sum(d_weights, weights) / total)
    d_logits = [weight * (d_weight - mean) for weight, d_weight in zip(weights, d_weights, strict=True)]
    on_query = [stored(d * inv * scale) for d, inv in zip(d_logits, inverse_rms, strict=True)]

    grads: list[Tensor] = []
    for i, source in enumerate(sources):
        if wanted[i]:
            on_row = stored(d_logits[i] * logits[i] * inverse_rms[i].square() / q.shape[0])
            d_row = d_out * stored(weights[i]) + on_query[i] * q - rows[i] * on_row
            grads.append(d_row.to(source.dtype).contiguous())
    if any(wanted[n:]):
        d_rows = weighted_sum(rows, on_query)
        if for_inductor and d_rows.device.type != "cpu":
            d_q = sum_over_rows(d_rows, promoted_dtype(sources))
        else:
            d_rows = d_rows.reshape(-1, q.shape[0])
            # This reduction runs over rows and has a loop of its own: let it read one tensor, not every source again.
            # (Measured, too: a matrix-vector product or a reduction per source, both slower in all.)
            d_q = (keep_in_memory(d_rows) if for_inductor and n > 2 else d_rows).sum(0)
        grads += query_grads(d_q, query, gain, wanted[n:])
    return grads


# Kernels, for eager mode.


def _flat_scores(sources: Sequence[Tensor], q: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """Inverse RMS and logits, each ``[n, rows]``."""
    shape = (len(sources), sources[0][..., 0].numel())
    inverse_rms, logits = q.new_empty(shape), q.new_empty(shape)
    for i, source in enumerate(sources):
        rows = flat_rows(source, q.dtype)
        torch.linalg.vector_norm(rows, dim=-1, out=inverse_rms[i])
        torch.mv(rows, q, out=logits[i])
    inverse_rms = inverse_rms.square_().div_(q.shape[0]).add_(eps).rsqrt_()
    return inverse_rms, logits.mul_(inverse_rms).mul_(scale)


def _forward(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum_: bool
) -> Tensor:
    _check(sources, query, gain)
    refuse_tangents("block_attn_res", *sources, query, gain)
    with torch.autocast(query.device.type, enabled=False):
        q = _folded_query(sources, query, gain)
        _, logits = _flat_scores(sources, q, eps, scale)
        weights = softmax(logits.unsqueeze(-1).unbind(0), float(len(sources)) if sum_ else 1.0)
        # No view is returned: autograd forbids to change a view from a custom operator in place, as a model may.
        out = q.new_empty(sources[0].shape)
        rows = out.view(-1, q.shape[0])
        torch.mul(flat_rows(sources[0], q.dtype), weights[0], out=rows)
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            rows.addcmul_(flat_rows(source, q.dtype), weight)
        return out.to(promoted_dtype(sources))


def _backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    refuse_tangents("block_attn_res_backward", grad, *sources, query, gain)
    n, total = len(sources), float(len(sources)) if sum_ else 1.0
    with torch.autocast(query.device.type, enabled=False):
        q = _folded_query(sources, query, gain)
        inverse_rms, logits = _flat_scores(sources, q, eps, scale)
        weights = torch.softmax(logits, 0).mul_(total)
        d_out = flat_rows(grad, q.dtype)
        d_weights, scratch = torch.empty_like(weights), torch.empty_like(d_out)
        for i, source in enumerate(sources):
            torch.sum(torch.mul(d_out, flat_rows(source, q.dtype), out=scratch), -1, out=d_weights[i])
        d_logits = weights * (d_weights - (weights * d_weights).sum(0).div_(total))
        on_query = d_logits * inverse_rms * scale
        on_row = d_logits * logits * inverse_rms.square() / -q.shape[0]

        grads: list[Tensor] = []
        d_q = torch.zeros_like(q)
        for i, source in enumerate(sources):
            rows = flat_rows(source, q.dtype)
            if any(wanted[n:]):
                d_q.addmv_(rows.t(), on_query[i])
            if wanted[i]:
                d_row = (d_out * weights[i].unsqueeze(-1)).addr_(on_query[i], q)
                d_row.addcmul_(rows, on_row[i].unsqueeze(-1))
                grads.append(d_row.to(source.dtype).view(source.shape))
        return grads + query_grads(d_q, query, gain, wanted[n:])


def _fake_forward(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum_: bool
) -> Tensor:
    _check(sources, query, gain)
    refuse_unsplit()
    return sources[0].new_empty(sources[0].shape, dtype=promoted_dtype(sources))


def _fake_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, *settings: Any
) -> list[Tensor]:
    asked = zip((*sources, query, gain), settings[-1], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want and tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, query, gain, *ctx.settings = inputs
    ctx.n_sources = len(sources)
    ctx.save_for_backward(*sources, query, *(() if gain is None else (gain,)))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    n, saved = ctx.n_sources, ctx.saved_tensors
    gain = saved[n + 1] if len(saved) > n + 1 else None
    on_sources, on_query, on_gain, *_ = ctx.needs_input_grad
    wanted = [*on_sources, on_query, gain is not None and on_gain]
    # Under create_graph the gradients must be differentiable themselves.
    backward: Any = _expand_backward if torch.is_grad_enabled() else torch.ops.attnres.block_attn_res_backward
    grads = iter(backward(grad, list(saved[:n]), saved[n], gain, *ctx.settings, wanted))
    by_input = [next(grads) if want else None for want in wanted]
    return by_input[:n], by_input[n], by_input[n + 1], None, None, None


def _register() -> None:
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
    # Under a torch.func transform the op is its expansion, which vmap, grad and jvp see through.
    torch.library.impl(_FORWARD, "FuncTorchDynamicLayerFrontMode", _expand_forward)

    ops = torch.ops.attnres
    register(ops.block_attn_res.default, _expand_forward, _fake_forward)
    register(ops.block_attn_res_backward.default, _expand_backward, _fake_backward)
    register_inductor_decomposition(ops.block_attn_res.default, partial(_expand_forward, for_inductor=True))
    register_inductor_decomposition(ops.block_attn_res_backward.default, partial(_expand_backward, for_inductor=True))


_register()
