"""Other implementations of one Attention Residuals read, each behind one signature.

A *form* takes sources ``[..., D]``, a query ``[D]`` and a key gain ``[D]``. What cannot be imported or run raises
:class:`NotAvailable`, whose text is the reason that the tables print. Some peers have no gain: the logit is
``<w, g * v / rms>``, so folding the gain into the query computes the same function.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

import attnres_rewrite.ops  # noqa: F401 (registers the operator)

EPS = 1e-6
Form = Callable[[list[Tensor], Tensor, Tensor], Tensor]


class NotAvailable(Exception):
    """A peer cannot be imported, or does not run here."""


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)


def reason(error: BaseException) -> str:
    """The first line of an error, without the folders of this machine."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = without_folders(lines[0].strip() if lines else "")[:240]
    return text if isinstance(error, NotAvailable) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def without_caches() -> Iterator[None]:
    """Let Inductor compile anew what it has in its caches, and say nothing about it."""
    with inductor_config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def version(distribution: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def block_attn_res(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    return torch.ops.attnres.block_attn_res(sources, query, gain, EPS, 1.0, False)


def stack_and_einsum(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """The paper's listing; computed as wide as the sources are."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * gain
    alpha = torch.softmax(torch.einsum("d,n...d->n...", query, keys), 0)
    return torch.einsum("n...,n...d->...d", alpha, values)


def naive_attnres() -> Form:
    """``fla.ops.attnres.naive_attnres`` of fla-core, in plain torch.

    Read in 0.6.0: it normalises with ``F.rms_norm`` (epsilon inside the root, the gain its weight), has a logit scale
    of 1.0, works in float32 and keeps the sources' dtype.
    """
    naive = naive_attnres_of_fla()

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        out: Tensor = naive(query, sources, gain, rms_eps=EPS, scale=1.0)
        return out

    return form


def naive_attnres_of_fla() -> Callable[..., Tensor]:
    """The function itself.

    The package ``fla.ops`` imports triton, which this one file does not need; where triton is missing the file is
    loaded by its path in the installed package.
    """
    try:
        module = importlib.import_module("fla.ops.attnres")
    except ImportError:
        found = importlib.util.find_spec("fla")
        if found is None or not found.submodule_search_locations:
            raise NotAvailable("fla-core is not installed") from None
        path = Path(found.submodule_search_locations[0]) / "ops" / "attnres" / "naive.py"
        spec = importlib.util.spec_from_file_location("_fla_ops_attnres_naive", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # Dynamo looks the globals of what it compiles up by name
        spec.loader.exec_module(module)
    function: Callable[..., Tensor] = module.naive_attnres
    return function


def fused_attnres() -> Form:
    """``fla.ops.attnres.fused_attnres`` of fla-core (read in 0.6.0), with its default checkpoint level of 1."""
    module = _cuda_module("fla.ops.attnres", "fla-core")

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        out: Tensor = module.fused_attnres(query, sources, gain, rms_eps=EPS)
        return out

    return form


def liger_attn_res() -> Form:
    """``liger_kernel.ops.LigerAttnResFunction`` of liger-kernel (read in 0.8.5).

    ``liger_kernel.transformers.functional.liger_attn_res`` is this in one line. It wants the sources stacked, and
    the stack is part of what it costs.
    """
    module = _cuda_module("liger_kernel.ops", "liger-kernel")

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        out: Tensor = module.LigerAttnResFunction.apply(torch.stack(sources), query, gain, EPS)
        return out

    return form


def flash_attn_res() -> Form:
    """``flash_attn_res.phase_1_batched_attention_triton_op`` with one query (read in 0.1.12).

    Its result is bfloat16 always, the width a power of two, the sources one stacked tensor ``[n, B, T, D]``. It is made
    for many queries on the same sources, which is another schedule than one read at a time.
    """
    module = _cuda_module("flash_attn_res", "flash-attn-res")

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        if sources[0].dtype != torch.bfloat16:
            raise NotAvailable("writes bfloat16 only")
        folded = (query * gain).unsqueeze(0)
        out: Tensor = module.phase_1_batched_attention_triton_op(torch.stack(sources), folded, EPS)[0]
        return out[0]

    return form


def fast_attnres() -> Form:
    """``attnres.attnres(values, query, *, eps, scale)`` of fast-attnres (read in 2.1.0); bfloat16 only."""
    module = _cuda_module("attnres", "fast-attnres")

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        if sources[0].dtype != torch.bfloat16:
            raise NotAvailable("takes bfloat16 only")
        out: Tensor = module.attnres(tuple(sources), query * gain, eps=EPS)
        return out

    return form


# Name in the tables, distribution, loader.
CUDA_PEERS: dict[str, tuple[str, Callable[[], Form]]] = {
    "fla fused_attnres": ("fla-core", fused_attnres),
    "fast-attnres": ("fast-attnres", fast_attnres),
    "liger attn_res": ("liger-kernel", liger_attn_res),
    "flash-attn-res": ("flash-attn-res", flash_attn_res),
}


def _cuda_module(name: str, distribution: str) -> ModuleType:
    if not torch.cuda.is_available():
        raise NotAvailable("needs CUDA")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise NotAvailable(f"{distribution}: import {name}: {reason(error)}") from error


# Inside a compiled model the two below must be operators that the compiler does not look into: fla's host code asks
# tensors for their addresses, which traced tensors do not have, and both are autograd functions that launch kernels.


def fla_operator() -> Form:
    """fla's kernels as an operator for graphs: its own launchers, nothing copied on the way."""
    module = _cuda_module("fla.ops.attnres.fused", "fla-core")

    @torch.library.custom_op("attnres_bench::fla_forward", mutates_args=())
    def forward(sources: list[Tensor], query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sources = [source.contiguous() for source in sources]
        table = module._build_ptr_table(sources)
        out, _, *stats = module.fused_attnres_fwd(query, sources, table, gain, None, EPS, 1.0, 1)
        return out, *stats

    @forward.register_fake
    def _(sources: list[Tensor], query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, n = sources[0].shape[:-1], len(sources)
        stats = [query.new_empty(shape, dtype=torch.float32) for shape in ((n, *rows), (n, *rows), tuple(rows))]
        return sources[0].new_empty(sources[0].shape), *stats

    @torch.library.custom_op("attnres_bench::fla_backward", mutates_args=())
    def backward(
        d_out: Tensor, sources: list[Tensor], query: Tensor, gain: Tensor, stats: list[Tensor]
    ) -> list[Tensor]:
        sources = [source.contiguous() for source in sources]
        table = module._build_ptr_table(sources)
        fixed = (d_out.contiguous(), query, sources, table, gain, None, None)
        d_sources, d_query, d_gain, _ = module.fused_attnres_bwd(*fixed, *stats, EPS, 1.0, 1)
        return [*d_sources, d_query, d_gain]

    @backward.register_fake
    def _(d_out: Tensor, sources: list[Tensor], query: Tensor, gain: Tensor, stats: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in (*sources, query, gain)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sources, query, gain = inputs
        ctx.n = len(sources)
        ctx.save_for_backward(*sources, query, gain, *output[1:])

    def differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Any, ...]:
        saved, n = ctx.saved_tensors, ctx.n
        grads = backward(d_out, list(saved[:n]), saved[n], saved[n + 1], list(saved[n + 2 :]))
        return grads[:n], grads[n], grads[n + 1]

    forward.register_autograd(differentiate, setup_context=setup)
    return lambda sources, query, gain: forward(list(sources), query, gain)[0]


def liger_operator() -> Form:
    """Liger's kernels as an operator for graphs; the stack before it is left to the compiler."""
    module = _cuda_module("liger_kernel.ops", "liger-kernel")

    @torch.library.custom_op("attnres_bench::liger_forward", mutates_args=())
    def forward(values: Tensor, query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, _, alpha, rstd = module.attn_res_forward(values, query, gain, EPS)
        return out, alpha, rstd

    @forward.register_fake
    def _(values: Tensor, query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, rows = values.shape[0], values[0, ..., 0].numel()
        alpha = values.new_empty((rows, n), dtype=torch.float32)
        return values.new_empty(values.shape[1:]), alpha, torch.empty_like(alpha)

    @torch.library.custom_op("attnres_bench::liger_backward", mutates_args=())
    def backward(
        d_out: Tensor, values: Tensor, query: Tensor, gain: Tensor, alpha: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = values.reshape(values.shape[0], -1, values.shape[-1]).contiguous()
        d_values, d_query, d_gain = module.attn_res_backward(d_out, flat, query, gain, alpha, rstd, EPS)
        return d_values.view(values.shape), d_query, d_gain

    @backward.register_fake
    def _(
        d_out: Tensor, values: Tensor, query: Tensor, gain: Tensor, alpha: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return values.new_empty(values.shape), torch.empty_like(query), torch.empty_like(gain)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    def differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return backward(d_out, *ctx.saved_tensors)

    forward.register_autograd(differentiate, setup_context=setup)
    return lambda sources, query, gain: forward(torch.stack(list(sources)), query, gain)[0]


# The other two peers are operators already.
GRAPH_PEERS: dict[str, Callable[[], Form]] = {
    "fla fused_attnres": fla_operator,
    "fast-attnres": fast_attnres,
    "liger attn_res": liger_operator,
    "flash-attn-res": flash_attn_res,
}
