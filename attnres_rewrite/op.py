"""``torch.ops.attnres.block_attn_res``: attention of a pseudo-query over the sources of a residual stream.

Equation (arXiv:2603.15031, Block AttnRes), for sources ``v_i`` ``[..., D]``, query ``w`` ``[D]``, gain ``g`` ``[D]``::

    logit_i = scale * <w, v_i * rsqrt(mean(v_i^2, -1) + eps) * g>
    alpha   = softmax over the sources i
    h       = sum_i alpha_i * v_i          (times the number of sources with sum=True)

Every form below first folds ``w`` and ``g`` into one vector ``q = w * g``, so that a row of a source is touched by
two dot products (with itself and with ``q``) and one weighted addition. Nothing stacks the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition

torch.library.define(
    "attnres::block_attn_res",
    "(Tensor[] sources, Tensor query, Tensor? gain, float eps, float scale, bool sum) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "attnres::block_attn_res_backward",
    "(Tensor grad, Tensor[] sources, Tensor query, Tensor? gain, float eps, float scale, bool sum, bool[] wanted)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _promoted_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    return dtype


def _check(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> None:
    if len(sources) == 0:
        raise ValueError("block_attn_res: sources is empty; it needs at least one tensor [..., D]")
    shape = sources[0].shape
    for i, source in enumerate(sources):
        if not source.dtype.is_floating_point:
            raise TypeError(f"block_attn_res: sources[{i}] is {source.dtype}; sources must be floating point")
        if source.dim() == 0:
            raise ValueError(f"block_attn_res: sources[{i}] has no dimensions; expected [..., D]")
        if source.shape != shape:
            raise ValueError(
                f"block_attn_res: sources[{i}] has shape {tuple(source.shape)}, sources[0] has {tuple(shape)}; "
                "all sources must have one shape"
            )
    for name, vector in (("query", query), ("gain", gain)):
        if vector is None:
            continue
        if not vector.dtype.is_floating_point:
            raise TypeError(f"block_attn_res: {name} is {vector.dtype}; it must be floating point")
        if vector.dim() != 1 or vector.shape[0] != shape[-1]:
            raise ValueError(
                f"block_attn_res: {name} has shape {tuple(vector.shape)}; expected ({shape[-1]},), "
                "the last dimension of the sources"
            )


def _folded_query(query: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    return query.to(dtype) if gain is None else query.to(dtype) * gain.to(dtype)


# ---------------------------------------------------------------- forms that a compiler fuses


def _scores(rows: Sequence[Tensor], q: Tensor, eps: float, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse RMS and logit of every source, each ``[..., 1]``."""
    inverse_rms, logits = [], []
    for row in rows:
        inv = torch.rsqrt((row * row).mean(-1, keepdim=True) + eps)
        inverse_rms.append(inv)
        logits.append((row * q).sum(-1, keepdim=True) * inv * scale)
    return inverse_rms, logits


def _weights(logits: Sequence[Tensor], total: float) -> list[Tensor]:
    """Softmax over the list, times ``total``; exactly one each if all logits are equal and total is their number."""
    peak = logits[0]
    for logit in logits[1:]:
        peak = torch.maximum(peak, logit)
    exps = [torch.exp(logit - peak) for logit in logits]
    denominator = exps[0]
    for exp in exps[1:]:
        denominator = denominator + exp
    factor = total / denominator
    return [exp * factor for exp in exps]


def _forward_per_source(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum_: bool
) -> Tensor:
    dtype = _compute_dtype(*sources, query, gain)
    q = _folded_query(query, gain, dtype)
    rows = [source.to(dtype) for source in sources]
    _, logits = _scores(rows, q, eps, scale)
    weights = _weights(logits, float(len(rows)) if sum_ else 1.0)
    out = rows[0] * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        out = out + row * weight
    return out.to(_promoted_dtype(sources)).contiguous()


def _backward_per_source(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    dtype = _compute_dtype(*sources, query, gain)
    q = _folded_query(query, gain, dtype)
    rows = [source.to(dtype) for source in sources]
    d_out = grad.to(dtype)
    inverse_rms, logits = _scores(rows, q, eps, scale)
    total = float(len(rows)) if sum_ else 1.0
    weights = _weights(logits, total)
    d_weights = [(d_out * row).sum(-1, keepdim=True) for row in rows]
    mean = weights[0] * d_weights[0]
    for weight, d_weight in zip(weights[1:], d_weights[1:], strict=True):
        mean = mean + weight * d_weight
    mean = mean / total
    d_logits = [weight * (d_weight - mean) for weight, d_weight in zip(weights, d_weights, strict=True)]
    on_query = [d * inv * scale for d, inv in zip(d_logits, inverse_rms, strict=True)]

    grads: list[Tensor] = []
    for i, (source, row) in enumerate(zip(sources, rows, strict=True)):
        if wanted[i]:
            on_row = d_logits[i] * logits[i] * inverse_rms[i] * inverse_rms[i] / row.shape[-1]
            d_row = d_out * weights[i] + on_query[i] * q - row * on_row
            grads.append(d_row.to(source.dtype).contiguous())
    if any(wanted[len(sources) :]):
        d_q = on_query[0] * rows[0]
        for c, row in zip(on_query[1:], rows[1:], strict=True):
            d_q = d_q + c * row
        grads += _query_grads(d_q.reshape(-1, q.shape[0]).sum(0), query, gain, wanted[len(sources) :])
    return grads


def _query_grads(d_q: Tensor, query: Tensor, gain: Tensor | None, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of query and gain from that of their product, as far as wanted."""
    grads = []
    if wanted[0]:
        grads.append((d_q if gain is None else d_q * gain.to(d_q.dtype)).to(query.dtype))
    if wanted[1] and gain is not None:
        grads.append((d_q * query.to(d_q.dtype)).to(gain.dtype))
    return grads


# ---------------------------------------------------------------- eager kernels


def _flat_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).reshape(-1, tensor.shape[-1])


def _eager_logits(
    sources: Sequence[Tensor], q: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Inverse RMS and logits, each ``[n, rows]``."""
    shape = (len(sources), sources[0][..., 0].numel())
    inverse_rms, logits = q.new_empty(shape), q.new_empty(shape)
    for i, source in enumerate(sources):
        rows = _flat_rows(source, q.dtype)
        torch.linalg.vector_norm(rows, dim=-1, out=inverse_rms[i])
        torch.mv(rows, q, out=logits[i])
    inverse_rms = inverse_rms.square_().div_(q.shape[0]).add_(eps).rsqrt_()
    return inverse_rms, logits.mul_(inverse_rms).mul_(scale)


@torch.library.impl("attnres::block_attn_res", "CompositeExplicitAutograd")
def _block_attn_res(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum_: bool
) -> Tensor:
    _check(sources, query, gain)
    q = _folded_query(query, gain, _compute_dtype(*sources, query, gain))
    _, logits = _eager_logits(sources, q, eps, scale)
    weights = torch.stack(_weights(logits.unbind(0), float(len(sources)) if sum_ else 1.0))
    out = _flat_rows(sources[0], q.dtype) * weights[0].unsqueeze(-1)
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        out.addcmul_(_flat_rows(source, q.dtype), weight.unsqueeze(-1))
    return out.to(_promoted_dtype(sources)).view(sources[0].shape)


@torch.library.impl("attnres::block_attn_res_backward", "CompositeExplicitAutograd")
def _block_attn_res_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    _check(sources, query, gain)
    n, shape = len(sources), sources[0].shape
    q = _folded_query(query, gain, _compute_dtype(*sources, query, gain))
    total = float(n) if sum_ else 1.0
    d_out = _flat_rows(grad, q.dtype)
    inverse_rms, logits = _eager_logits(sources, q, eps, scale)
    weights = torch.softmax(logits, 0) * total
    d_weights = torch.stack([torch.linalg.vecdot(d_out, _flat_rows(source, q.dtype)) for source in sources])
    d_logits = weights * (d_weights - (weights * d_weights).sum(0) / total)
    on_query = d_logits * inverse_rms * scale
    on_row = d_logits * logits * inverse_rms * inverse_rms / q.shape[0]

    grads: list[Tensor] = []
    d_q = torch.zeros_like(q)
    for i, source in enumerate(sources):
        rows = _flat_rows(source, q.dtype)
        if any(wanted[n:]):
            d_q.addmv_(rows.t(), on_query[i])
        if wanted[i]:
            d_rows = d_out * weights[i].unsqueeze(-1)
            d_rows.addr_(on_query[i], q).addcmul_(rows, on_row[i].unsqueeze(-1), value=-1)
            grads.append(d_rows.to(source.dtype).view(shape))
    return grads + _query_grads(d_q, query, gain, wanted[n:])


@torch.library.register_fake("attnres::block_attn_res")
def _fake(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum_: bool
) -> Tensor:
    _check(sources, query, gain)
    return sources[0].new_empty(sources[0].shape, dtype=_promoted_dtype(sources))


@torch.library.register_fake("attnres::block_attn_res_backward")
def _fake_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    inputs = [*sources, query, gain]
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want and t is not None]


# ---------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, query, gain, ctx.eps, ctx.scale, ctx.sum_ = inputs
    ctx.save_for_backward(*sources, query, *(() if gain is None else (gain,)))
    ctx.n_sources = len(sources)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    n = ctx.n_sources
    saved = ctx.saved_tensors
    sources, query, gain = saved[:n], saved[n], (saved[n + 1] if len(saved) > n + 1 else None)
    on_sources, on_query, on_gain, *_ = ctx.needs_input_grad
    wanted = [*on_sources, on_query, bool(on_gain) and gain is not None]
    args = (grad, list(sources), query, gain, ctx.eps, ctx.scale, ctx.sum_, wanted)
    if torch.is_grad_enabled():
        grads = iter(_backward_per_source(*args))  # create_graph: made of differentiable operators
    else:
        grads = iter(torch.ops.attnres.block_attn_res_backward(*args))
    found = [next(grads) if want else None for want in wanted]
    return found[:n], found[n], found[n + 1], None, None, None


torch.library.register_autograd("attnres::block_attn_res", _autograd_backward, setup_context=_setup_context)
register_inductor_decomposition(torch.ops.attnres.block_attn_res.default, _forward_per_source)
register_inductor_decomposition(torch.ops.attnres.block_attn_res_backward.default, _backward_per_source)


def depth_weights(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None = None, *, eps: float = 1e-6, scale: float = 1.0
) -> Tensor:
    """The depth weights alpha alone: ``[n, ...]`` float32 for n sources ``[..., D]``."""
    _check(sources, query, gain)
    q = _folded_query(query, gain, _compute_dtype(*sources, query, gain))
    _, logits = _eager_logits(sources, q, eps, scale)
    return torch.softmax(logits, 0).float().view(len(sources), *sources[0].shape[:-1])
torch.library.impl("attnres::block_attn_res", "FuncTorchDynamicLayerFrontMode")(_forward_per_source)
