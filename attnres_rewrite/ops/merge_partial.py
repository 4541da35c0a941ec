"""``torch.ops.attnres.merge_partial``: phase two of the two-phase schedule (arXiv:2603.15031, section 4).

From what ``attend_blocks`` found for a read, mixed ``m`` ``[..., D]`` and log-sum ``l`` ``[..., 1]``, and the partial
``p`` ``[..., D]`` of the read's own block (or that block, complete, for the read after the last one), by one step of
online softmax::

    a = sigmoid(scale * <w, p * rsqrt(mean(p^2, -1) + eps) * g> - l)
    h = m + a * (p - m)                                  (times ``total``)

Other forms of the read take the sum ``b`` ``[..., D]`` of the blocks as well, and have a gate ``c`` ``[1]``, which is 1
where there is none (``base`` as in ``block_attn_res``)::

    s = b + p                                            (the plain sum)
    h = s + c * ((base - 1) * s + total * (m + a * (p - m)))

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
    as_stored,
    check_gate,
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

# Left out of the nodes of the paper's form.
_FORM = "Tensor? blocks=None, Tensor? gate=None, float base=0.0"

torch.library.define(_FORWARD, f"({_INPUTS}, {_FORM}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# `wanted` has one flag for each of the tensors, five and then those of the form, if there are any; only those gradients
# are returned.
torch.library.define(
    _BACKWARD, f"(Tensor grad, {_INPUTS}, bool[] wanted, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _check(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    blocks: Tensor | None,
    gate: Tensor | None,
    base: float,
) -> None:
    sources = [tensor for tensor in (mixed, partial, blocks) if tensor is not None]
    check_sources("merge_partial", sources, ("query", query), ("gain", gain))
    check_gate("merge_partial", gate)
    if tuple(log_sum.shape) != (*mixed.shape[:-1], 1):
        raise ValueError(
            f"merge_partial: log_sum has shape {tuple(log_sum.shape)}; expected {(*mixed.shape[:-1], 1)}, one for "
            f"every row of mixed {tuple(mixed.shape)}"
        )
    if blocks is None and (gate is not None or base != 0.0):
        raise ValueError("merge_partial: a gate, or a base that is not 0, needs the sum of the blocks")


def _expand_forward(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
    blocks: Tensor | None = None,
    gate: Tensor | None = None,
    base: float = 0.0,
    *,
    for_inductor: bool = False,
) -> Tensor:
    _check(mixed, log_sum, partial, query, gain, blocks, gate, base)
    row_by_row, stored = hints(for_inductor, mixed.device)
    dtype = compute_dtype(mixed, log_sum, partial, query, gain, blocks, gate)
    out = mixed.to(dtype)
    if partial is not None:
        p = partial.to(dtype)
        logit = scores([p], folded_query(query, gain, dtype), eps, scale)[1][0]
        share = stored(torch.sigmoid(row_by_row(logit) - log_sum))
        out = out + share * (p - out)
    out = out if total == 1.0 else out * total
    if blocks is not None:
        plain = _plain(blocks.to(dtype), partial)
        out = plain * base + out if gate is None else plain + gate.to(dtype) * (plain * (base - 1.0) + out)
    # No result may be an input.
    out = out.clone() if out is mixed else out
    return as_stored(out, promoted_dtype([mixed] if partial is None else [mixed, partial]), for_inductor)


def _plain(blocks: Tensor, partial: Tensor | None) -> Tensor:
    """The sum of the sources, in the dtype of ``blocks``."""
    return blocks if partial is None else blocks + partial.to(blocks.dtype)


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
    blocks: Tensor | None = None,
    gate: Tensor | None = None,
    base: float = 0.0,
    *,
    for_inductor: bool = False,
) -> list[Tensor]:
    """Gradients, as far as wanted, of mixed, log-sum, partial, query and gain, then of blocks and gate."""
    row_by_row, stored = hints(for_inductor, mixed.device)
    dtype = compute_dtype(mixed, log_sum, partial, query, gain, blocks, gate)
    given = grad.to(dtype)
    # Of what the attention gives, and of the plain sum beside it.
    d_out = given * total if gate is None else given * (total * gate.to(dtype))
    d_plain = None
    if blocks is not None:
        d_plain = given * (base if gate is None else 1.0 + gate.to(dtype) * (base - 1.0))
    found: list[Tensor] = []
    m = mixed.to(dtype)
    if partial is None:
        out = m
        zeros = [torch.zeros_like(tensor) for tensor in (log_sum, query, query if gain is None else gain)]
        found += [d_out.to(mixed.dtype).contiguous()] if wanted[0] else []
        found += [zero for zero, want in zip(zeros, (wanted[1], *wanted[3:5]), strict=True) if want]
    else:
        p, q = partial.to(dtype), folded_query(query, gain, dtype)
        (inverse_rms,), (logit,) = scores([p], q, eps, scale)
        share = torch.sigmoid(row_by_row(logit) - log_sum)
        d_share = (d_out * (p - m)).sum(-1, keepdim=True)
        d_logit = row_by_row(d_share * share * (1 - share))
        on_query = stored(d_logit * inverse_rms * scale)
        kept = stored(share)
        out = m + kept * (p - m)
        if wanted[0]:
            found.append(as_stored(d_out - d_out * kept, mixed.dtype, for_inductor))
        if wanted[1]:
            found.append((-d_logit).to(log_sum.dtype))
        if wanted[2]:
            on_row = stored(d_logit * logit * inverse_rms.square() / q.shape[0])
            d_row = d_out * kept + on_query * q - p * on_row
            found.append(as_stored(d_row if d_plain is None else d_row + d_plain, partial.dtype, for_inductor))
        if any(wanted[3:5]):
            d_rows = p * on_query
            stored_as = partial.dtype if for_inductor and partial.device.type != "cpu" else None
            found += query_grads(sum_over_rows(d_rows, stored_as), query, gain, wanted[3:5])
    if blocks is not None and d_plain is not None and wanted[5]:
        found.append(d_plain.to(blocks.dtype).contiguous())
    if blocks is not None and gate is not None and wanted[6]:
        differing = _plain(blocks.to(dtype), partial) * (base - 1.0) + out * total
        found.append((given * differing).sum().reshape(1).to(gate.dtype))
    return found


def _forward(mixed: Tensor, log_sum: Tensor, partial: Tensor | None, query: Tensor, *rest: Any) -> Tensor:
    refuse_tangents("merge_partial", mixed, log_sum, partial, query, *_optional(rest))
    return _expand_forward(mixed, log_sum, partial, query, *rest)


def _backward(grad: Tensor, mixed: Tensor, log_sum: Tensor, partial: Tensor | None, *rest: Any) -> list[Tensor]:
    refuse_tangents("merge_partial_backward", grad, mixed, log_sum, partial, *_optional(rest))
    return _expand_backward(grad, mixed, log_sum, partial, *rest)


def _optional(arguments: Sequence[Any]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def _fake_forward(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
    blocks: Tensor | None = None,
    gate: Tensor | None = None,
    base: float = 0.0,
) -> Tensor:
    _check(mixed, log_sum, partial, query, gain, blocks, gate, base)
    return mixed.new_empty(mixed.shape, dtype=promoted_dtype([mixed] if partial is None else [mixed, partial]))


def _fake_backward(
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
    blocks: Tensor | None = None,
    gate: Tensor | None = None,
    base: float = 0.0,
) -> list[Tensor]:
    of_form = () if blocks is None else (blocks, gate)
    asked = zip((mixed, log_sum, partial, query, gain, *of_form), wanted, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in asked if want and tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.scale, ctx.total, blocks, gate, ctx.base = inputs
    tensors = [*tensors, blocks, gate]
    ctx.there = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    *tensors, blocks, gate = [next(saved) if there else None for there in ctx.there]
    # Torch leaves out, here and in what it takes back, the last arguments of a call that are the defaults.
    given = [*ctx.needs_input_grad, False, False, False][:11]
    wanted = [there and want for there, want in zip(ctx.there, (*given[:5], *given[8:10]), strict=True)]
    backward: Any = _expand_backward if torch.is_grad_enabled() else torch.ops.attnres.merge_partial_backward
    settings = (ctx.eps, ctx.scale, ctx.total)
    asked = wanted if blocks is not None else wanted[:5]
    found = iter(backward(grad, *tensors, *settings, asked, blocks, gate, ctx.base))
    by_input = [next(found) if want else None for want in wanted]
    return (*by_input[:5], None, None, None, *by_input[5:], None)[: len(ctx.needs_input_grad)]


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
