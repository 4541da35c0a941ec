"""What the operators share: checks, keys, softmax and weighted sum over a list of sources.

Sources ``v_i`` are ``[..., D]``, scalars of a row ``[..., 1]``; a query ``q = w * g`` is ``[D]``, or ``[S, D]`` against
rows ``[..., S, D]``. Inner arithmetic is float32, or float64 if any input is. Nothing here stacks the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_sources(op: str, sources: Sequence[Tensor], *vectors: tuple[str, Tensor | None]) -> None:
    """Raise unless ``sources`` are floating-point tensors of one shape ``[..., D]`` and every vector is ``[D]``.

    Raises:
        ValueError: No sources, or a wrong shape.
        TypeError: A tensor that is not floating point.
    """
    if len(sources) == 0:
        raise ValueError(f"{op}: sources is empty; it needs at least one tensor [..., D]")
    shape = tuple(sources[0].shape)
    if not shape:
        raise ValueError(f"{op}: sources have no dimensions; expected [..., D]")
    for i, source in enumerate(sources):
        if not source.dtype.is_floating_point:
            raise TypeError(f"{op}: sources[{i}] is {source.dtype}; sources must be floating point")
        if tuple(source.shape) != shape:
            raise ValueError(
                f"{op}: sources[{i}] has shape {tuple(source.shape)} but sources[0] has {shape}; "
                "all sources must have one shape"
            )
    for name, vector in vectors:
        if vector is None:
            continue
        if not vector.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} is {vector.dtype}; it must be floating point")
        if tuple(vector.shape) != shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(vector.shape)}; expected {shape[-1:]}, "
                f"the last dimension of sources of shape {shape}"
            )


def check_gate(op: str, gate: Tensor | None) -> None:
    """Raise unless ``gate`` is a floating-point tensor ``[1]`` or None.

    Raises:
        ValueError: It has another shape.
        TypeError: It is not floating point.
    """
    if gate is None:
        return
    if not gate.dtype.is_floating_point:
        raise TypeError(f"{op}: gate is {gate.dtype}; it must be floating point")
    if tuple(gate.shape) != (1,):
        raise ValueError(f"{op}: gate has shape {tuple(gate.shape)}; expected (1,)")


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor is dual (``torch.autograd.forward_ad``): a custom operator would drop its tangent.

    Raises:
        NotImplementedError: A tensor has a tangent.
    """
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation with torch.autograd.forward_ad does not reach a custom operator, "
                "and the result would have no tangent; torch.func.jvp sees through it"
            )


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the sum of ``tensors``."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the inner arithmetic."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def folded_query(query: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Query times gain ``[D]``."""
    return query.to(dtype) if gain is None else query.to(dtype) * gain.to(dtype)


def flat_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``[rows, D]`` in ``dtype``."""
    return tensor.to(dtype).reshape(-1, tensor.shape[-1])


def query_grads(d_q: Tensor, query: Tensor, gain: Tensor | None, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of query and gain, as far as wanted, from that of their product."""
    grads = []
    if wanted[0]:
        grads.append((d_q if gain is None else d_q * gain.to(d_q.dtype)).to(query.dtype))
    if wanted[1] and gain is not None:
        grads.append((d_q * query.to(d_q.dtype)).to(gain.dtype))
    return grads


# Hints. On CPU, what an expansion looks like decides how many passes over memory Inductor's C++ makes. It turns the row
# reductions of all sources into one loop over D, the softmax over the sources into a loop over rows, and the weighted
# sum into another loop over D. These three share one outer loop over rows, so that a row is still in cache when it is
# read for the second time, only if none of them vectorises across rows, which the softmax would. The hints below
# prevent that and change no value; benchmarks/op.py measures the result. From 13 sources on Inductor splits
# the loops all the same.

Hint = Callable[[Tensor], Tensor]


def _row_by_row(value: Tensor) -> Tensor:
    """``value`` itself, computed so that Inductor's C++ does not vectorise it: it knows no vectors of int16."""
    return value + torch.isnan(value).to(torch.int16)


def keep_in_memory(value: Tensor) -> Tensor:
    """``value`` itself, kept in memory by Inductor, not computed again wherever it is read."""
    return value.as_strided(value.size(), value.stride())


def unchanged(value: Tensor) -> Tensor:
    """``value`` itself."""
    return value


def hints(for_inductor: bool, device: torch.device) -> tuple[Hint, Hint]:
    """What makes a scalar of a row be computed row by row, and what makes it be kept in memory."""
    return (_row_by_row, keep_in_memory) if for_inductor and device.type == "cpu" else (unchanged, unchanged)


def as_stored(value: Tensor, dtype: torch.dtype, for_inductor: bool) -> Tensor:
    """``value``, a tensor of the size of the stream, as it goes to memory: contiguous and in ``dtype``.

    On a GPU Inductor would keep the float32 number that is rounded here, twice the memory, or not even that but what it
    was computed from, and round where it is used. Where it is kept, and nothing else is, it is kept in ``dtype``.
    """
    kept = value.to(dtype).contiguous()
    return keep_in_memory(kept) if for_inductor and value.device.type != "cpu" else kept


def inverse_rms_of(rows: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Inverse RMS of every source, each ``[..., 1]``."""
    return [torch.rsqrt((row * row).mean(-1, keepdim=True) + eps) for row in rows]


def logits_of(rows: Sequence[Tensor], inverse_rms: Sequence[Tensor], q: Tensor, scale: float) -> list[Tensor]:
    """Logit of every source, each ``[..., 1]``."""
    dots = [(row * q).sum(-1, keepdim=True) for row in rows]
    return [dot * inv * scale for dot, inv in zip(dots, inverse_rms, strict=True)]


def scores(rows: Sequence[Tensor], q: Tensor, eps: float, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse RMS and logit of every source, each ``[..., 1]``."""
    inverse_rms = inverse_rms_of(rows, eps)
    return inverse_rms, logits_of(rows, inverse_rms, q, scale)


def exponentials(logits: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The largest logit, ``exp(logit - largest)`` of every source, and their sum; each ``[..., 1]``."""
    peak = logits[0]
    for logit in logits[1:]:
        peak = torch.maximum(peak, logit)
    exps = [torch.exp(logit - peak) for logit in logits]
    denominator = exps[0]
    for exp in exps[1:]:
        denominator = denominator + exp
    return peak, exps, denominator


def softmax(logits: Sequence[Tensor], total: float, row_by_row: Hint = unchanged) -> list[Tensor]:
    """Softmax over the list, times ``total``: exactly 1 each if the logits are equal and ``total`` is their number."""
    _, exps, denominator = exponentials(logits)
    factor = row_by_row(total / denominator)
    return [exp * factor for exp in exps]


def coefficients(
    weights: Sequence[Tensor], inverse_rms: Sequence[Tensor] | None, gate: Tensor | None, base: float
) -> list[Tensor]:
    """What every source is multiplied by, from its weight in the attention, each ``[..., 1]``.

    Args:
        weights: The depth weights, times their total.
        inverse_rms: Those of the sources if values are normalised.
        gate: ``[1]``, on what differs from the plain sum, in which every coefficient is 1.
        base: What every coefficient has besides.
    """
    found = list(weights)
    if inverse_rms is not None:
        found = [weight * inv for weight, inv in zip(weights, inverse_rms, strict=True)]
    if gate is not None:
        return [1.0 + gate.to(one.dtype) * (one + (base - 1.0)) for one in found]
    return [one + base for one in found] if base else found


def weighted_sum(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_i weights_i * rows_i``."""
    out = rows[0] * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        out = out + row * weight
    return out


def sum_over_rows(table: Tensor, stored_as: torch.dtype | None) -> Tensor:
    """The sum over all rows of ``[..., D]``, ``[D]``.

    On a GPU such a sum is a kernel of its own, as it runs over rows. ``stored_as`` lets it read one tensor of this
    dtype, and not every tensor that ``table`` is computed from. The rounding of what is summed is then that of the
    gradients of the sources, and smaller in the sum.
    """
    rows = table.reshape(-1, table.shape[-1])
    return rows.sum(0) if stored_as is None else keep_in_memory(rows.to(stored_as)).sum(0, dtype=table.dtype)
