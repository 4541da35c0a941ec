"""Pass 6: a model that attends over depth already is not rewritten."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.graph.extent import Extent
from attnres_rewrite.graph.nodes import module_path, source_line
from attnres_rewrite.passes.base import Pass, Refusal
from attnres_rewrite.patterns.base import Mismatch
from attnres_rewrite.patterns.depth_attention import ATTENDS_OVER_DEPTH, DepthAttention


class RefuseDepthAttention(Pass):
    """Refuse a graph in which stream values of different depths are weighted by what computes from them."""

    def call(self, module: GraphModule, extents: Sequence[Extent]) -> tuple[Refusal, ...]:
        """The refusal, if there is one; ``module`` is not changed."""
        found = DepthAttention().match(module.graph, extents)
        if isinstance(found, Mismatch):
            return ()
        error = UnsupportedResidualError(f"{ATTENDS_OVER_DEPTH} (at {source_line(found)})")
        return (Refusal(module_path(found), error),)

    def summary(self, result: tuple[Refusal, ...]) -> str:
        """Counts for the log."""
        return f"{len(result)} refusals"
