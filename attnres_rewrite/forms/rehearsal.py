"""What a rewrite tries before it is done, so that what would fail in the first call fails now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.capture.dynamo import Capture, capture_whole
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.forms.backend import rewrite_captured
from attnres_rewrite.forms.graph_module import SiteMaker
from attnres_rewrite.graph.nodes import normalise_path
from attnres_rewrite.passes import Site
from attnres_rewrite.pipeline import insert
from attnres_rewrite.streams import StreamPlan


def runs_as_captured(model: nn.Module, captured: Capture, owners: Iterable[str]) -> bool:
    """Whether the graph of the rewritten model will be the captured one, with the sites in it and nothing else.

    Args:
        model: The model, before anything is installed in it. Hooks, and what a library has put over a ``forward``, may
            do otherwise when the live forward surrounds them.
        captured: What was captured of it.
        owners: The owners of the streams that are taken. One that runs twice has more reads than sites.
    """
    if not captured.whole or any(_has_own_ways(module) for module in model.modules()):
        return False
    calls = {
        (key, normalise_path(path))
        for node in captured.modules[0].graph.nodes
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()
    }
    paths = [path for _, path in calls]
    return all(paths.count(owner) <= 1 for owner in owners)


def _has_own_ways(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or _compat.has_hooks(module)


def rewrite_ahead(captured: Capture, plans: Sequence[StreamPlan], config: AttnResConfig) -> list[Site]:
    """Rewrite the captured graph, where it is what the model runs; it is of no use afterwards."""
    (module,) = captured.modules
    maker = SiteMaker(module, config)
    return [site for plan in plans for site in insert(module, plan, maker.parameters(plan), config)]


def trace_ahead(model: nn.Module, call: Call, captured: Capture) -> list[Site]:
    """Trace the first call of the rewritten ``model``, and rewrite its graph.

    Not for a model that is known to break, outside its streams; nor for one on the meta device, which has no weights to
    be called with.
    """
    if not captured.whole or any(parameter.is_meta for parameter in model.parameters()):
        return []
    try:
        module = capture_whole(model, call, scalars=captured.scalars)
    except _compat.graph_break_types():
        # Breaks outside the streams, which capture() found harmless.
        return []
    return rewrite_captured(module)
