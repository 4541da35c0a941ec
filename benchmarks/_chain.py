"""A chain of sublayers with three kinds of residual connection, and what the compiler says its memory traffic is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _peers import NotAvailable, stack_and_einsum, version, without_caches
from torch import Tensor, nn
from torch._inductor import metrics

import attnres_rewrite
from attnres_rewrite import AttnResConfig


class Sublayer(nn.Module):
    """RMSNorm and a projection through ``rank`` channels.

    Cheap, but like any sublayer it begins and ends with a matrix product, so its input and output are in memory.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.norm(x)))


class ResidualChain(nn.Module):
    """Plain residual connections."""

    def __init__(self, sublayers: int, width: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sublayer(width, rank) for _ in range(sublayers))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class HyperConnectedChain(nn.Module):
    """Manifold-constrained hyper-connections: ``mHC`` of the package hyper-connections (read in 0.4.11)."""

    def __init__(self, sublayers: int, width: int, rank: int, streams: int) -> None:
        super().__init__()
        if version("hyper-connections") is None:
            raise NotAvailable("hyper-connections is not installed")
        from hyper_connections import mHC

        connect, self.expand, self.reduce = mHC.get_init_and_expand_reduce_stream_functions(streams, dim=width)
        self.layers = nn.ModuleList(
            connect(branch=Sublayer(width, rank), layer_index=index) for index in range(sublayers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.reduce(x))


def attnres_chain(sublayers: int, width: int, rank: int, blocks: int, schedule: str) -> nn.Module:
    """:class:`ResidualChain` rewritten, with random queries."""
    model = ResidualChain(sublayers, width, rank)
    config = AttnResConfig(blocks=blocks, schedule=schedule)  # type: ignore[arg-type]
    attnres_rewrite.rewrite(model, config=config, example_inputs=torch.randn(1, 8, width))
    for name, parameter in attnres_rewrite.attnres_parameters(model):
        if name.endswith("query"):
            nn.init.normal_(parameter, std=width**-0.5)
    return model


def listed_chain(model: nn.Module, x: Tensor, blocks: int) -> Tensor:
    """What :func:`attnres_chain` computes, read by read after the paper's listing; blocks must be of one size."""
    layers: Any = model.layers
    sites: Any = list(model.attn_res)
    sizes, sources = len(layers) // blocks, [x]
    partial: Tensor | None = None
    for index, layer in enumerate(layers):
        value = x
        if index:
            site = sites[index - 1]
            now = sources if partial is None else [*sources, partial]
            value = stack_and_einsum(now, site.query, site.gain)
        out = layer(value)
        partial = out if partial is None else partial + out
        if (index + 1) % sizes == 0:
            sources, partial = [*sources, partial], None
    assert partial is None
    return model.norm(stack_and_einsum(sources, sites[-1].query, sites[-1].gain))


@contextlib.contextmanager
def _accounting() -> Iterator[None]:
    """Inductor adds up the bytes of every graph only where this log is on; nothing is printed."""
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    before = log.level, log.propagate, log.handlers
    log.propagate, log.handlers = False, [logging.NullHandler()]
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        level, log.propagate, log.handlers = before
        log.setLevel(level)


def moved_bytes(first_call: Callable[[], Any]) -> int:
    """Bytes that the kernels read and write that a call compiles when it is made for the first time.

    By Inductor's own count, for which a kernel touches a buffer once, however often it reads it.
    """
    metrics.reset()
    with _accounting(), without_caches():
        first_call()
    return int(metrics.num_bytes_accessed)
