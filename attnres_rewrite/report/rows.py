"""What a picture shows of a stream: its blocks with a row for every read, long runs told by their first and last."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from attnres_rewrite.report.data import StreamReport

# Up to as many layers, and blocks, are all drawn.
MOST_LAYERS = 12
MOST_BLOCKS = 16
# How many are drawn before and after a gap: layers of a block, and blocks.
_LAYERS_KEPT = 1
_BLOCKS_KEPT = 3

ItemT = TypeVar("ItemT")


@dataclasses.dataclass(frozen=True)
class Row:
    """A read of the stream, and what is added next.

    Attributes:
        site: The site that is read, from 0 as its parameters are numbered; ``None`` where b_0 alone is read.
        read_by: The modules that read.
        sources: What they read.
        adds: The modules whose outputs are added next; none after the last read.
    """

    site: int | None
    read_by: tuple[str, ...]
    sources: tuple[str, ...]
    adds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, or a run of layers that is not drawn one by one.

    Attributes:
        names: The layers; one, if it is drawn.
        rows: Its reads.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Box:
    """A block, or a run of blocks that is not drawn one by one.

    Attributes:
        blocks: Numbers of the blocks, from 1; one, if it is drawn.
        layers: Its layers.
    """

    blocks: range
    layers: tuple[Layer, ...]


def boxes_of(stream: StreamReport) -> list[Box]:
    """The blocks of ``stream``, in depth order."""
    rows = rows_of(stream)[:-1]
    boxes = []
    for block, inside in itertools.groupby(zip(stream.sites, rows, strict=True), lambda pair: pair[0].block):
        groups = itertools.groupby(inside, lambda pair: pair[0].layer)
        layers = [Layer((name,), tuple(row for _, row in pairs)) for name, pairs in groups]
        if len(stream.layers) > MOST_LAYERS:
            layers = _with_gap(layers, _LAYERS_KEPT, _joined_layers)
        boxes.append(Box(range(block, block + 1), tuple(layers)))
    return _with_gap(boxes, _BLOCKS_KEPT, _joined_boxes) if len(boxes) > MOST_BLOCKS else boxes


def rows_of(stream: StreamReport) -> list[Row]:
    """A row for the read before every branch output, and one for the read after the last."""
    sites = stream.sites
    reads = [(None, stream.root_read_by, ("b_0",)), *((k, s.read_by, s.sources) for k, s in enumerate(sites))]
    adds = [*(site.adds for site in sites), ()]
    return [Row(*read, added) for read, added in zip(reads, adds, strict=True)]


def _with_gap(items: list[ItemT], kept: int, joined: Callable[[Sequence[ItemT]], ItemT]) -> list[ItemT]:
    """``items`` with those in the middle as one, if they are at least two."""
    middle = items[kept:-kept]
    return [*items[:kept], joined(middle), *items[-kept:]] if len(middle) > 1 else items


def _joined_layers(layers: Sequence[Layer]) -> Layer:
    return Layer(
        tuple(name for layer in layers for name in layer.names), tuple(row for layer in layers for row in layer.rows)
    )


def _joined_boxes(boxes: Sequence[Box]) -> Box:
    layers = [layer for box in boxes for layer in box.layers]
    names = tuple(dict.fromkeys(name for layer in layers for name in layer.names))
    rows = tuple(row for layer in layers for row in layer.rows)
    return Box(range(boxes[0].blocks.start, boxes[-1].blocks.stop), (Layer(names, rows),))
