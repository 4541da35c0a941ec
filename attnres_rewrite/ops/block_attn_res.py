"""``torch.ops.attnres.block_attn_res``: attention of a pseudo-query over the sources of a residual stream.

Equation (arXiv:2603.15031, Block AttnRes), for sources ``v_i`` ``[..., D]``, query ``w`` ``[D]``, gain ``g`` ``[D]``::

    logit_i = scale * <w, v_i * rsqrt(mean(v_i^2, -1) + eps) * g>
    alpha   = softmax over the sources i
    h       = sum_i alpha_i * v_i          (times the number of sources with sum=True)

Other forms of the read have other coefficients of the same sources. With ``base`` b and ``value_norm``, of which the
paper knows neither, and with a gate ``c`` ``[1]``, which is 1 where there is none::

    coefficient_i = b + alpha_i            (times the inverse RMS of v_i with value_norm; alpha_i times n with sum=True)
    h             = sum_i (1 + c * (coefficient_i - 1)) * v_i

Inner arithmetic is float32, or float64 if any input is; the result has the sources' promoted dtype.

Query and gain are first folded into ``q = w * g``, so a row of a source is touched by two dot products, with
itself and with ``q``, and by one weighted addition. No form stacks the sources. Autograd saves the inputs alone and
the backward computes inverse RMS and logits again; compiled, the partitioner keeps those of the forward.

The op exists in two forms. The *kernels* run in eager mode, source by source. The *expansions*
(:mod:`block_attn_res_expanded`) are what Inductor fuses with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops.arithmetic import (
    coefficients,
    flat_rows,
    promoted_dtype,
    query_grads,
    refuse_tangents,
    scores,
    softmax,
)
from attnres_rewrite.ops.block_attn_res_expanded import check, expand_backward, expand_forward, folded, in_compute_dtype
from attnres_rewrite.ops.decomposition_table import register
from attnres_rewrite.ops.pipelining import refuse_unsplit

_FORWARD = "attnres::block_attn_res"
_BACKWARD = "attnres::block_attn_res_backward"
_INPUTS = "Tensor[] sources, Tensor query, Tensor? gain, float eps, float scale, bool sum"
# Left out of the nodes of the paper's form.
_FORM = "Tensor? gate=None, float base=0.0, bool value_norm=False"

torch.library.define(_FORWARD, f"({_INPUTS}, {_FORM}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag per source, then those of query, gain and, if there is one, gate; only these gradients are
# returned.
torch.library.define(
    _BACKWARD, f"(Tensor grad, {_INPUTS}, bool[] wanted, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
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
    check(sources, query, gain)
    rows, q = in_compute_dtype(sources, query, gain)
    logits = torch.stack([logit.squeeze(-1) for logit in scores(rows, q, eps, scale)[1]])
    return torch.softmax(logits, 0).to(torch.float32)


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
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    gate: Tensor | None = None,
    base: float = 0.0,
    value_norm: bool = False,
) -> Tensor:
    check(sources, query, gain, gate)
    refuse_tangents("block_attn_res", *sources, query, gain, gate)
    with torch.autocast(query.device.type, enabled=False):
        q = folded(sources, query, gain, gate)
        inverse_rms, logits = _flat_scores(sources, q, eps, scale)
        weights = softmax(logits.unsqueeze(-1).unbind(0), float(len(sources)) if sum_ else 1.0)
        factors = coefficients(weights, inverse_rms.unsqueeze(-1).unbind(0) if value_norm else None, gate, base)
        # No view is returned: autograd forbids to change a view from a custom operator in place, as a model may.
        out = q.new_empty(sources[0].shape)
        rows = out.view(-1, q.shape[0])
        torch.mul(flat_rows(sources[0], q.dtype), factors[0], out=rows)
        for source, factor in zip(sources[1:], factors[1:], strict=True):
            rows.addcmul_(flat_rows(source, q.dtype), factor)
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
    gate: Tensor | None = None,
    base: float = 0.0,
    value_norm: bool = False,
) -> list[Tensor]:
    refuse_tangents("block_attn_res_backward", grad, *sources, query, gain, gate)
    n, total = len(sources), float(len(sources)) if sum_ else 1.0
    with torch.autocast(query.device.type, enabled=False):
        q = folded(sources, query, gain, gate)
        inverse_rms, logits = _flat_scores(sources, q, eps, scale)
        weights = torch.softmax(logits, 0).mul_(total)
        norms = [inverse_rms] if value_norm else None
        (factors,) = coefficients([weights], norms, gate, base)
        d_out = flat_rows(grad, q.dtype)
        d_factors, scratch = torch.empty_like(weights), torch.empty_like(d_out)
        for i, source in enumerate(sources):
            torch.sum(torch.mul(d_out, flat_rows(source, q.dtype), out=scratch), -1, out=d_factors[i])
        d_weights = d_factors if gate is None else d_factors * gate.to(q.dtype)
        d_weights = d_weights * inverse_rms if value_norm else d_weights
        d_logits = weights * (d_weights - (weights * d_weights).sum(0).div_(total))
        on_query = d_logits * inverse_rms * scale
        on_norm = d_logits * logits + d_weights * weights if value_norm else d_logits * logits
        on_row = on_norm * inverse_rms.square() / -q.shape[0]

        grads: list[Tensor] = []
        d_q = torch.zeros_like(q)
        for i, source in enumerate(sources):
            rows = flat_rows(source, q.dtype)
            if any(wanted[n : n + 2]):
                d_q.addmv_(rows.t(), on_query[i])
            if wanted[i]:
                d_row = (d_out * factors[i].unsqueeze(-1)).addr_(on_query[i], q)
                d_row.addcmul_(rows, on_row[i].unsqueeze(-1))
                grads.append(d_row.to(source.dtype).view(source.shape))
        grads += query_grads(d_q, query, gain, wanted[n:])
        if gate is not None and wanted[n + 2]:
            (ungated,) = coefficients([weights], norms, None, base - 1.0)
            grads.append((d_factors * ungated).sum().reshape(1).to(gate.dtype))
        return grads


def _fake_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    sum_: bool,
    gate: Tensor | None = None,
    base: float = 0.0,
    value_norm: bool = False,
) -> Tensor:
    check(sources, query, gain, gate)
    refuse_unsplit()
    return sources[0].new_empty(sources[0].shape, dtype=promoted_dtype(sources))


def _fake_backward(
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
) -> list[Tensor]:
    asked = zip((*sources, query, gain, *(() if gate is None else (gate,))), wanted, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want and tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, query, gain, *ctx.settings, gate, ctx.base, ctx.value_norm = inputs
    ctx.n_sources, ctx.has = len(sources), (gain is not None, gate is not None)
    ctx.save_for_backward(*sources, query, *(tensor for tensor in (gain, gate) if tensor is not None))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    n, saved = ctx.n_sources, ctx.saved_tensors
    rest = iter(saved[n + 1 :])
    gain, gate = (next(rest) if there else None for there in ctx.has)
    # Torch leaves out, here and in what it takes back, the last arguments of a call that are the defaults.
    on_sources, on_query, on_gain, _, _, _, *form_wanted = ctx.needs_input_grad
    wanted = [*on_sources, on_query, gain is not None and on_gain, *(() if gate is None else form_wanted[:1])]
    # Under create_graph the gradients must be differentiable themselves.
    backward: Any = expand_backward if torch.is_grad_enabled() else torch.ops.attnres.block_attn_res_backward
    form = (gate, ctx.base, ctx.value_norm)
    grads = iter(backward(grad, list(saved[:n]), saved[n], gain, *ctx.settings, wanted, *form))
    by_input = [next(grads) if want else None for want in wanted]
    on_form = [*by_input[n + 2 :], None, None, None]
    found = (by_input[:n], by_input[n], by_input[n + 1], None, None, None, *on_form)
    return found[: len(ctx.needs_input_grad)]


def _register() -> None:
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
    # Under a torch.func transform the op is its expansion, which vmap, grad and jvp see through.
    torch.library.impl(_FORWARD, "FuncTorchDynamicLayerFrontMode", expand_forward)

    ops = torch.ops.attnres
    register(ops.block_attn_res.default, expand_forward, _fake_forward)
    register(ops.block_attn_res_backward.default, expand_backward, _fake_backward)
    register_inductor_decomposition(ops.block_attn_res.default, partial(expand_forward, for_inductor=True))
    register_inductor_decomposition(ops.block_attn_res_backward.default, partial(expand_backward, for_inductor=True))


_register()
