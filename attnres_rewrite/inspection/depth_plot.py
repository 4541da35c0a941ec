"""Draws the heatmap of the depth weights, sites by sources, with matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from attnres_rewrite.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnres_rewrite.inspection.depth import DepthAttention

# Inches of a cell, and of what is around the heatmap.
_CELL_WIDTH, _CELL_HEIGHT = 0.55, 0.24
_MARGIN_WIDTH, _MARGIN_HEIGHT = 4.2, 1.4
# An image file of more pixels a side than this is of no use to anybody.
_LARGEST_SIDE = 60.0


def draw(depth: DepthAttention, path: str | PathLike[str]) -> None:
    """Write the mean weights as an image file; its kind is that of the file's name.

    Args:
        depth: The weights.
        path: The file to write.

    Raises:
        MissingPackageError: matplotlib is not installed (extra ``plot``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("plotting", "matplotlib", "plot") from error
    rows, columns = depth.weights.shape
    width, height = _MARGIN_WIDTH + _CELL_WIDTH * columns, _MARGIN_HEIGHT + _CELL_HEIGHT * rows
    figure = Figure(figsize=(min(width, _LARGEST_SIDE), min(height, _LARGEST_SIDE)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(depth.weights.numpy(), aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_facecolor("0.92")
    axes.set_xticks(range(columns), depth.sources)
    axes.set_yticks(range(rows), depth.labels, fontsize=7)
    axes.set_xlabel("source")
    axes.set_ylabel("read by")
    axes.set_title("mean depth weight")
    if any(count > 1 for _, count in depth.groups):
        _mark_blocks(axes, depth.groups)
    figure.colorbar(image, pad=0.02, aspect=40, fraction=0.05)
    figure.savefig(path, dpi=120)


def _mark_blocks(axes: Axes, groups: Sequence[tuple[str, int]]) -> None:
    """Lines between the rows of different blocks, and the names of the blocks at the right."""
    ends = list(itertools.accumulate(count for _, count in groups))
    for end in ends[:-1]:
        # White on the cells, black beside them: seen on both.
        axes.axhline(end - 0.5, color="white", linewidth=2.0)
        axes.axhline(end - 0.5, color="black", linewidth=0.8)
    middles = [end - (count + 1) / 2 for end, (_, count) in zip(ends, groups, strict=True)]
    names = axes.secondary_yaxis("right")
    names.set_yticks(middles, [name for name, _ in groups], fontsize=7)
    names.tick_params(length=0)
