"""Runs the passes in order over one graph: first the analysis, then the rewrite."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import AttnResError, NoResidualStreamError, UnsupportedResidualError
from attnres_rewrite.graph.extent import extents_of
from attnres_rewrite.graph.nodes import is_inside, op_name, source_line
from attnres_rewrite.passes import (
    AccountForSublayers,
    CheckRewrite,
    Expansion,
    FindStreams,
    GroupLayers,
    InlineRegions,
    InsertAttnRes,
    Leftover,
    OutlineLayers,
    PlaceSites,
    Refusal,
    RefuseDepthAttention,
    RefuseNonSums,
    ResolveInplaceOps,
    ScheduleReads,
    Site,
    SiteParameters,
    SpellOutSums,
    StreamAnalysis,
    SumGradients,
)
from attnres_rewrite.patterns.refusal import POST_NORM
from attnres_rewrite.streams import RejectedAdd, ResidualStream, StreamPlan, rejected_lines

# How many lines an error gives to what was seen.
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was found in a graph.

    Attributes:
        plans: The plan for every stream that is to be rewritten.
        found: Owners of all streams, also of those that the configuration leaves plain.
        rejected: The adds that were considered and are on no stream.
    """

    plans: tuple[StreamPlan, ...]
    found: tuple[str, ...]
    rejected: tuple[RejectedAdd, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The streams and the other adds of all graphs of a model."""

    streams: tuple[ResidualStream, ...]
    rejected: tuple[RejectedAdd, ...]

    @classmethod
    def of(cls, analyses: Sequence[StreamAnalysis]) -> Found:
        """What was found graph by graph, together."""
        streams = itertools.chain.from_iterable(analysis.streams for analysis in analyses)
        return cls(tuple(streams), tuple(itertools.chain.from_iterable(analysis.rejected for analysis in analyses)))


def find_streams(module: GraphModule) -> StreamAnalysis:
    """The residual streams of ``module``, whose checkpointed regions and in-place adds are resolved first."""
    InlineRegions()(module)
    ResolveInplaceOps()(module)
    SpellOutSums()(module)
    analysis: StreamAnalysis = FindStreams()(module)
    return analysis


def analyse(modules: Sequence[GraphModule], config: AttnResConfig) -> Analysis:
    """Find the streams of a model and group their layers into blocks.

    Args:
        modules: The graphs of the model, of which every one holds whole streams.
        config: Which streams to take, and how to group.

    Raises:
        UnsupportedResidualError: The model already has AttnRes, or its residuals are of a refused kind.
        NoResidualStreamError: There is no residual stream, or none of the modules that the
            configuration names holds one.
        BlockPartitionError: The layers of a stream cannot be grouped as the configuration asks.
    """
    for node in itertools.chain.from_iterable(module.graph.nodes for module in modules):
        if op_name(node) in ("block_attn_res", "merge_partial"):
            raise UnsupportedResidualError(
                f"the model already has Attention Residuals (at {source_line(node)}): "
                "undo(model) takes them out, then it can be rewritten again"
            )
    analyses = [find_streams(module) for module in modules]
    found = Found.of(analyses)
    for refusal in itertools.chain.from_iterable(map(_refusals, modules, analyses, itertools.repeat(config))):
        if not found.streams or _concerns(refusal, config.streams):
            raise _explained(refusal, found)
    graph_of = {stream: module for module, a in zip(modules, analyses, strict=True) for stream in a.streams}
    plans = tuple(GroupLayers()(graph_of[stream], stream, config) for stream in selected(found.streams, config))
    return Analysis(plans, tuple(stream.owner for stream in found.streams), found.rejected)


def _refusals(module: GraphModule, analysis: StreamAnalysis, config: AttnResConfig) -> list[Refusal]:
    """Why one graph of a model cannot be rewritten, or not all of it, the most telling reason first."""
    extents = extents_of(module.graph, analysis.streams)
    non_sums, over_depth = RefuseNonSums()(module, analysis), RefuseDepthAttention()(module, extents)
    # A norm on the stream itself is the plainer reason, where its factor meets another value of the stream.
    has_post_norm = any(str(refusal.error).startswith(POST_NORM) for refusal in non_sums)
    found = [*non_sums, *over_depth] if has_post_norm else [*over_depth, *non_sums]
    if config.leftovers == "refuse":
        left: tuple[Leftover, ...] = AccountForSublayers()(module, extents, analysis.rejected)
        found += [Refusal(one.module, one.error) for one in left]
    return found


def _explained(refusal: Refusal, found: Found) -> AttnResError:
    """The error with what could be rewritten without it, and with what was seen."""
    parts = [str(refusal.error)]
    if others := tuple(s.owner for s in found.streams if not _concerns(refusal, (s.owner,))):
        parts.append(
            f"To leave this as it is, and rewrite the other streams alone, name them: AttnResConfig(streams={others})"
        )
    seen = [f"  chain of {len(s.branches)} adds in module {s.owner or '(root)'!r}" for s in found.streams]
    seen += rejected_lines([(source_line(r.node), r.reason) for r in found.rejected])
    if seen:
        parts.append("What was seen (chains, and adds that are on none):")
        parts += seen[:_SHOWN] + [f"  and {len(seen) - _SHOWN} more"] * (len(seen) > _SHOWN)
    return type(refusal.error)("\n".join(parts))


def _concerns(refusal: Refusal, owners: Sequence[str] | None) -> bool:
    """Whether what was refused may be a part of the streams in ``owners``; ``None`` means all."""
    return owners is None or any(is_inside(refusal.module, owner) for owner in owners)


def selected(streams: Sequence[ResidualStream], config: AttnResConfig) -> list[ResidualStream]:
    """The streams that the configuration names, or all.

    Raises:
        NoResidualStreamError: A name in ``config.streams`` is no owner of a stream.
    """
    if config.streams is None:
        return list(streams)
    owners = [stream.owner for stream in streams]
    missing = [name for name in config.streams if name not in owners]
    if missing:
        raise NoResidualStreamError(f"streams names {missing}, but the streams found are in modules {owners}")
    return [stream for stream in streams if stream.owner in config.streams]


def insert(
    module: GraphModule, plan: StreamPlan, parameters: Sequence[SiteParameters], config: AttnResConfig
) -> list[Site]:
    """Rewrite a planned stream of ``module`` in place and check the result."""
    before = Expansion(plan)
    own: list[SiteParameters] = SumGradients()(module, plan.stream, parameters)
    inserted: list[Site] = InsertAttnRes()(module, plan, own, config)
    scheduled: list[Site] = ScheduleReads()(module, inserted, config)
    PlaceSites()(module, scheduled)
    CheckRewrite()(module, plan, scheduled, before)
    return scheduled


def outline(module: GraphModule, streams: Sequence[tuple[ResidualStream, Sequence[Site]]]) -> Callable[[Site], Site]:
    """Let the layers of rewritten streams that are computed alike be compiled once; returns what updates a site."""
    return OutlineLayers()(module, streams).updated  # type: ignore[no-any-return]
