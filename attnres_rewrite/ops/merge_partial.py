"""``torch.ops.attnres.merge_partial``: phase two of the two-phase schedule (arXiv:2603.15031, section 4).

From what ``attend_blocks`` found for a read, mixed ``m`` ``[..., D]`` and log-sum ``l`` ``[..., 1]``, and the partial
``p`` ``[..., D]`` of the read's own block (or that block, complete, for the read after the last one), by one step of
online softmax::

    a = sigmoid(scale * <w, p * rsqrt(mean(p^2, -1) + eps) * g> - l)
    h = m + a * (p - m)                                  (times ``total``)

With ``total`` 1, or the number of sources for ``aggregation="sum"``, this is ``block_attn_res`` over the blocks and the
partial, up to rounding. The first read of a block has no partial, so ``h = m``. The work is the same for every read,
however many blocks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial as bind
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops.arithmetic import (
    check_sources,
    compute_dtype,
    folded_query,
    hints,
    promoted_dtype,
    query_grads,
    refuse_tangents,
    scores,
    sum_over_rows,
)
from attnres_rewrite.ops.decomposition_table import register

_FORWARD, _BACKWARD = "attnres::merge_partial", "attnres::merge_partial_backward"
_INPUTS = (
    "Tensor mixed, Tensor log_sum, Tensor? partial, Tensor query, Tensor? gain, float eps, float scale, float total"
)

torch.library.define(_FORWARD, f"({_INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag for each of the five tensors; only those gradients are returned.
torch.library.define(
    _BACKWARD, f"(Tensor grad, {_INPUTS}, bool[] wanted) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _check(mixed: Tensor, log_sum: Tensor, partial: Tensor | None, query: Tensor, gain: Tensor | None) -> None:
    sources = [mixed] if partial is None else [mixed, partial]
    check_sources("merge_partial", sources, ("query", query), ("gain", gain))
    if tuple(log_sum.shape) != (*mixed.shape[:-1], 1):
        raise ValueError(
            f"merge_partial: log_sum has shape {tuple(log_sum.shape)}; expected {(*mixed.shape[:-1], 1)}, one for "
            f"every row of mixed {tuple(mixed.shape)}"
        )


def _expand_forward(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
    *,
    for_inductor: bool = False,
) -> Tensor:
    _check(mixed, log_sum, partial, query, gain)
    row_by_row, stored = hints(for_inductor, mixed.device)
    dtype = compute_dtype(mixed, log_sum, partial, query, gain)
    out = mixed.to(dtype)
    if partial is not None:
        p = partial.to(dtype)
        logit = scores([p], folded_query(query, gain, dtype), eps, scale)[1][0]
        share = stored(torch.sigmoid(row_by_row(logit) - log_sum))
        out = out + share * (p - out)
    out = out if total == 1.0 else out * total
    out = out.to(promoted_dtype([mixed] if partial is None else [mixed, partial])).contiguous()
    # No result may be an input.
    return out.clone() if out is mixed else out


def _expand_backward(
    grad: Tensor,
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
    wanted: Sequence[bool],
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    """Gradients, as far as wanted, of mixed, log-sum, partial, query and gain."""
    row_by_row, stored = hints(for_inductor, mixed.device)
    dtype = compute_dtype(mixed, log_sum, partial, query, gain)
    d_out = grad.to(dtype) * total
    if partial is None:
        zeros = (torch.zeros_like(tensor) for tensor in (log_sum, query, query if gain is None else gain))
        return [
            *([d_out.to(mixed.dtype).contiguous()] if wanted[0] else []),
            *(zero for zero, want in zip(zeros, (wanted[1], *wanted[3:]), strict=True) if want),
        ]
    m, p, q = mixed.to(dtype), partial.to(dtype), folded_query(query, gain, dtype)
    (inverse_rms,), (logit,) = scores([p], q, eps, scale)
    share = torch.sigmoid(row_by_row(logit) - log_sum)
    d_share = (d_out * (p - m)).sum(-1, keepdim=True)
    d_logit = row_by_row(d_share * share * (1 - share))
    on_query = stored(d_logit * inverse_rms * scale)
    found: list[Tensor] = []
    kept = stored(share)
    if wanted[0]:
        found.append((d_out - d_out * kept).to(mixed.dtype).contiguous())
    if wanted[1]:
        found.append((-d_logit).to(log_sum.dtype))
    if wanted[2]:
        on_row = stored(d_logit * logit * inverse_rms.square() / q.shape[0])
        found.append((d_out * kept + on_query * q - p * on_row).to(partial.dtype).contiguous())
    if any(wanted[3:]):
        d_rows = p * on_query
        stored_as = partial.dtype if for_inductor and partial.device.type != "cpu" else None
        found += query_grads(sum_over_rows(d_rows, stored_as), query, gain, wanted[3:])
    return found


def _forward(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
) -> Tensor:
    refuse_tangents("merge_partial", mixed, log_sum, partial, query, gain)
    return _expand_forward(mixed, log_sum, partial, query, gain, eps, scale, total)


def _backward(grad: Tensor, mixed: Tensor, log_sum: Tensor, *rest: Any) -> list[Tensor]:
    partial, query, gain, *_ = rest
    refuse_tangents("merge_partial_backward", grad, mixed, log_sum, partial, query, gain)
    return _expand_backward(grad, mixed, log_sum, *rest)


def _fake_forward(
    mixed: Tensor, log_sum: Tensor, partial: Tensor | None, query: Tensor, gain: Tensor | None, *_: float
) -> Tensor:
    _check(mixed, log_sum, partial, query, gain)
    return mixed.new_empty(mixed.shape, dtype=promoted_dtype([mixed] if partial is None else [mixed, partial]))


def _fake_backward(
    grad: Tensor,
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    *settings: Any,
) -> list[Tensor]:
    asked = zip((mixed, log_sum, partial, query, gain), settings[-1], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want and tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:]
    ctx.there = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if there else None for there in ctx.there]
    wanted = [there and want for there, want in zip(ctx.there, ctx.needs_input_grad[:5], strict=True)]
    backward: Any = _expand_backward if torch.is_grad_enabled() else torch.ops.attnres.merge_partial_backward
    found = iter(backward(grad, *tensors, *ctx.settings, wanted))
    return (*(next(found) if want else None for want in wanted), None, None, None)


def _register() -> None:
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
    # Under a torch.func transform the op is its expansion, which vmap, grad and jvp see through.
    torch.library.impl(_FORWARD, "FuncTorchDynamicLayerFrontMode", _expand_forward)

    ops = torch.ops.attnres
    register(ops.merge_partial.default, _expand_forward, _fake_forward)
    register(ops.merge_partial_backward.default, _expand_backward, _fake_backward)
    register_inductor_decomposition(ops.merge_partial.default, bind(_expand_forward, for_inductor=True))
    register_inductor_decomposition(ops.merge_partial_backward.default, bind(_expand_backward, for_inductor=True))


_register()
