"""``torch.ops.attnres.no_partial``: what stands for a partial and a log-sum where a read has none.

A read of one partial, log-sum ``l`` and mixed ``m`` is ``m`` if the partial is zeros and ``l`` is infinite, exactly::

    a = sigmoid(logit - inf) = 0        h = m + 0 * (0 - m) = m

so that reads with and without a partial can be calls of one graph. A graph that is called is differentiated once, for
all calls: what stands for a partial asks for a gradient wherever a partial does, and drops it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite._compat import register_inductor_decomposition
from attnres_rewrite.ops.arithmetic import compute_dtype

_NAME = "attnres::no_partial"

torch.library.define(_NAME, "(Tensor like, Tensor query) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def _no_partial(like: Tensor, query: Tensor) -> list[Tensor]:
    """Zeros like ``like`` ``[..., D]``, and infinity ``[..., 1]`` in the dtype of the arithmetic."""
    arithmetic = compute_dtype(like, query)
    zeros = like.new_zeros(like.shape)
    return [zeros, like.new_full((*like.shape[:-1], 1), math.inf, dtype=arithmetic)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[None, None]:
    return None, None


torch.library.impl(_NAME, "CompositeExplicitAutograd", _no_partial)
torch.library.register_fake(_NAME, _no_partial)
torch.library.register_autograd(_NAME, _differentiate, setup_context=_setup_context)
register_inductor_decomposition(torch.ops.attnres.no_partial.default, _no_partial)
