"""How ``attnres::block_attn_res`` is written in ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export(custom_translation_table=...)`` takes."""
    return {torch.ops.attnres.block_attn_res.default: block_attn_res}


def block_attn_res(sources: Sequence[Any], query: Any, gain: Any, eps: float, scale: float, sum: bool) -> Any:
    """One site, vectorised over its sources.

    The sources are stacked before the last dimension, ``V`` ``[..., n, D]``, so that logits and result
    are each one MatMul: nodes per source would dominate the time of a short decode step.
    """
    import numpy
    from onnxscript import ir
    from onnxscript import opset18 as op

    wide = ir.DataType.DOUBLE if sources[0].dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    kind = "float64" if wide == ir.DataType.DOUBLE else "float32"

    def constant(value: float | list[int], dtype: str = kind) -> Any:
        tensor: Any = ir.tensor(numpy.array(value, dtype=dtype))
        return op.Constant(value=tensor)

    def cast(value: Any) -> Any:
        return value if value.dtype == wide else op.Cast(value, to=wide)

    before_last = constant([-2], "int64")
    v = cast(op.Concat(*(op.Unsqueeze(source, before_last) for source in sources), axis=-2))
    q = cast(query) if gain is None else op.Mul(cast(query), cast(gain))
    mean_square = op.ReduceMean(op.Mul(v, v), constant([-1], "int64"), keepdims=0)
    rms = op.Sqrt(op.Add(mean_square, constant(eps)))
    logits = op.Div(op.MatMul(v, q), rms)
    if scale != 1.0:
        logits = op.Mul(logits, constant(scale))
    alpha = op.Unsqueeze(op.Softmax(logits, axis=-1), before_last)
    h = op.Squeeze(op.MatMul(alpha, v), before_last)
    if sum:
        h = op.Mul(h, constant(float(len(sources))))
    return h if sources[0].dtype == wide else op.CastLike(h, sources[0])
