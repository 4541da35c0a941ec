"""What is told of one residual stream, as plain data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site: a read of the stream that gets Attention Residuals.

    Attributes:
        adds: The modules whose outputs were added to the stream since the site before; none, where a value is read
            again, scaled or with others mixed in.
        layer: Name of the layer that these belong to.
        block: Number of the block that these belong to, from 1.
        read_by: The modules that read.
        sources: What it attends over: ``b_0`` (the embedding), ``b_n`` (the sum of block n), ``partial`` (the sum of
            the block in progress).
    """

    adds: tuple[str, ...]
    layer: str
    block: int
    read_by: tuple[str, ...]
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """One residual stream.

    Attributes:
        owner: The module that holds the whole stream; ``""`` is the model itself.
        width: D, the size of the stream.
        branches: Number of branch outputs, which is also the number of sites.
        layers: Names of the layers.
        blocks: For every block, the names of its layers; a layer may be in several where they are counted in sublayers.
        sources: Number of sources of every site.
        parameters: Number of parameters that are added.
        bytes_per_token: Memory that the block summaries take while the forward runs, in bytes a token.
        without_norm: Where a read is not followed by a norm: with ``aggregation="mean"`` the model does not start as it
            was there.
        sites: Every site, in depth order.
        root: What computes the stream's first value b_0: a module, or an input.
        root_read_by: The modules that read b_0 alone; such a read has one source, and no site.
        why: Why there are so many blocks, where ``blocks="auto"`` chose their number.
    """

    owner: str
    width: int
    branches: int
    layers: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    sources: tuple[int, ...]
    parameters: int
    bytes_per_token: int
    without_norm: tuple[str, ...] = ()
    sites: tuple[SiteReport, ...] = ()
    root: str = ""
    root_read_by: tuple[str, ...] = ()
    why: str | None = None
