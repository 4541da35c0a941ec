"""The streams, layers, blocks and sites that a rewrite would make."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from torch.fx import Node

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph.nodes import data_inputs, module_path, require_tensor, source_line
from attnres_rewrite.passes.reads_without_norm import reads_without_norm
from attnres_rewrite.patterns import reads_of
from attnres_rewrite.patterns.operators import is_dropout
from attnres_rewrite.pipeline import Analysis
from attnres_rewrite.report.data import SiteReport, StreamReport
from attnres_rewrite.report.picture import picture
from attnres_rewrite.streams import StreamPlan, rejected_lines


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rewrite would do; ``print`` shows it as a table.

    Attributes:
        streams: The streams that would be rewritten.
        parameters: Number of parameters that the model has before.
        rejected: Source line and reason of every add that was considered and is on no stream.
    """

    streams: tuple[StreamReport, ...]
    parameters: int
    rejected: tuple[tuple[str, str], ...]

    @property
    def added(self) -> int:
        """Number of parameters that are added."""
        return sum(stream.parameters for stream in self.streams)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return dataclasses.asdict(self)

    def graph(self, path: str | PathLike[str]) -> None:
        """Write a picture of the blocks, the reads and their sources to an SVG file.

        It needs no package, follows the reader's light or dark scheme, and draws long runs of layers or blocks as their
        first and last ones.

        Args:
            path: The file, whose name ends in ``.svg``.

        Raises:
            ValueError: The name of the file has another ending.
        """
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"the picture is an SVG file: give it a name that ends in .svg, not {str(path)!r}")
        Path(path).write_text(picture(self.streams), encoding="utf-8")

    def __str__(self) -> str:
        share = self.added / max(self.parameters, 1)
        lines = [f"{len(self.streams)} residual stream(s); {self.added:,} parameters added ({share:.3%})"]
        for stream in self.streams:
            lines.extend(_stream_lines(stream))
        if self.rejected:
            lines.append(f"{len(self.rejected)} other adds, by source line:")
            lines.extend(rejected_lines(self.rejected))
        return "\n".join(lines)


def _stream_lines(stream: StreamReport) -> list[str]:
    lines = [
        f"stream of {stream.owner or '(root)'}: width {stream.width}, {len(stream.layers)} layers, "
        f"{stream.branches} branch outputs, {stream.branches} sites, "
        f"{stream.bytes_per_token:,} bytes per token for the block summaries",
        *([] if stream.why is None else [f"  {stream.why}"]),
        "  block  layers",
    ]
    for number, layers in enumerate(stream.blocks, start=1):
        span = layers[0] if len(layers) == 1 else f"{layers[0]} ... {layers[-1]}"
        lines.append(f"  {number:5d}  {span}")
    lines.append(f"  sources per site: {' '.join(map(str, stream.sources))}")
    lines += [f"  read without a norm: {where}" for where in stream.without_norm]
    return lines


def make_report(analysis: Analysis, config: AttnResConfig, parameters: int) -> Report:
    """The report of an analysis; ``parameters`` is what the model has before."""
    rejected = tuple((source_line(r.node), r.reason) for r in analysis.rejected)
    return Report(tuple(_stream(plan, config) for plan in analysis.plans), parameters, rejected)


def _stream(plan: StreamPlan, config: AttnResConfig) -> StreamReport:
    stream, on_stream = plan.stream, {step.node for step in plan.stream.steps}
    root = require_tensor(stream.root)
    per_site = stream.width * (2 if config.key_gain else 1) + config.gate
    layer_and_block = tuple(zip(plan.layer_of, plan.block_of, strict=True))
    blocks = tuple(
        tuple(dict.fromkeys(plan.layers[layer] for layer, block in layer_and_block if block == wanted))
        for wanted in range(plan.blocks)
    )
    of_root_alone = [stream.root, *(step.node for step in stream.steps if plan.parts[step.node] == {0})]
    return StreamReport(
        owner=stream.owner,
        width=stream.width,
        branches=len(stream.branches),
        layers=plan.layers,
        blocks=blocks,
        sources=plan.sources,
        parameters=per_site * len(stream.branches),
        bytes_per_token=(plan.blocks + 1) * stream.width * root.element_size(),
        without_norm=tuple(reads_without_norm((branch.value for branch in stream.branches), on_stream)),
        sites=_sites(plan, on_stream),
        root=_name(stream.root),
        root_read_by=_names(n for value in of_root_alone for n in reads_of(value, on_stream)),
        why=plan.why,
    )


def _sites(plan: StreamPlan, on_stream: Container[Node]) -> tuple[SiteReport, ...]:
    last_of_block = dict(zip(plan.block_of, plan.stream.branches, strict=True))
    sites = []
    for branch, layer, block in zip(plan.stream.branches, plan.layer_of, plan.block_of, strict=True):
        name = plan.layers[layer]
        in_progress = None if branch is last_of_block[block] else block + 1
        parts = sorted(plan.parts[branch.value])
        outputs = (output.node for add in branch.adds for output in add.outputs)
        sites.append(
            SiteReport(
                adds=tuple(dict.fromkeys(_child(path, name) for path in _names(outputs))),
                layer=name,
                block=block + 1,
                read_by=_names(reads_of(branch.value, on_stream)),
                sources=tuple("partial" if part == in_progress else f"b_{part}" for part in parts),
            )
        )
    return tuple(sites)


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_name, nodes)))


def _name(node: Node) -> str:
    """The module that ``node`` runs in; in a graph that tells of none, the node."""
    # A dropout on what a module computes says nothing of it.
    while is_dropout(node) and (sources := list(data_inputs(node))):
        node = sources[0]
    return "the output of the model" if node.op == "output" else module_path(node) or node.name


def _child(path: str, layer: str) -> str:
    """The child of the layer that the module ``path`` is in: ``layers.0.mlp`` for ``layers.0.mlp.down_proj``."""
    if not path.startswith(f"{layer}."):
        return path
    inside = path.removeprefix(f"{layer}.").split(".")
    # The children of a layer may be in a list: ``block.0.layer.1.DenseReluDense``.
    depth = 3 if len(inside) > 1 and inside[1].isdigit() else 1
    return ".".join([layer, *inside[:depth]])
