"""What ``explain`` answers: the streams, layers, blocks and sites that a rewrite would make."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph.nodes import require_tensor, source_line
from attnres_rewrite.passes.reads_without_norm import reads_without_norm
from attnres_rewrite.pipeline import Analysis
from attnres_rewrite.streams import StreamPlan, rejected_lines


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
    root = require_tensor(plan.stream.root)
    on_stream = {step.node for step in plan.stream.steps}
    per_site = plan.stream.width * (2 if config.key_gain else 1)
    layer_and_block = tuple(zip(plan.layer_of, plan.block_of, strict=True))
    blocks = tuple(
        tuple(dict.fromkeys(plan.layers[layer] for layer, block in layer_and_block if block == wanted))
        for wanted in range(plan.blocks)
    )
    return StreamReport(
        owner=plan.stream.owner,
        width=plan.stream.width,
        branches=len(plan.stream.branches),
        layers=plan.layers,
        blocks=blocks,
        sources=plan.sources,
        parameters=per_site * len(plan.stream.branches),
        bytes_per_token=(plan.blocks + 1) * plan.stream.width * root.element_size(),
        without_norm=tuple(reads_without_norm((branch.value for branch in plan.stream.branches), on_stream)),
    )
