"""What the operators refuse as they are traced: a pipeline that is to be split where no stages can meet."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError


def refuse_unsplit() -> None:
    """Raise :class:`UnsupportedResidualError` within a ``pipeline`` that would not split, or within a layer.

    ``torch.distributed.pipelining`` splits before the call of a module. The module of an ``ExportedProgram`` has their
    names, for its parameters, and runs the operators of all of them itself.
    """
    if (traced := _compat.split_by_pipelining()) is None:
        return
    module, places = traced
    if not places:
        return
    if isinstance(module, GraphModule):
        reason = _uncalled(module, places)
    else:
        reason = _within_layer(module, places) or _has_region(module)
    if reason is not None:
        raise UnsupportedResidualError(reason)


def _uncalled(module: GraphModule, places: Mapping[str, bool]) -> str | None:
    called = {node.target for node in module.graph.nodes if node.op == "call_module"}
    if missing := [name for name in places if name not in called]:
        return (
            f"pipeline(split_spec=...) is to split at {missing[0]!r}, but the graph that it was given calls no such "
            "module, so it would be one stage. Give it the modules back: pipeline(torch.export.unflatten(program), "
            "...) in place of program.module()"
        )
    return None


def _within_layer(module: nn.Module, places: Mapping[str, bool]) -> str | None:
    owners = [name.rpartition("attn_res")[0] for name, _ in module.named_modules() if name.split(".")[-1] == "attn_res"]
    for owner in owners:
        graph = getattr(module.get_submodule(owner[:-1]), "graph", None)
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"] if graph is not None else []
        for place in (place for place in places if place.startswith(owner)):
            if layer := _layer_around(place.removeprefix(owner), called, places[place]):
                return (
                    f"pipeline(split_spec=...) is to split at {place!r}, within the layer {owner + layer!r}. Stages "
                    f"are cut between layers: name {owner + layer!r}, or the layer after it, and unflatten the program "
                    "again, since PyTorch leaves its marks in these modules"
                )
    return None


def _layer_around(place: str, called: list[str], is_begin: bool) -> str | None:
    """The layer that is cut at ``place``, which is not one of its ends.

    Args:
        place: The name of a module, within the module that holds the layers.
        called: What that module calls, in order: whole layers, or their parts.
        is_begin: Whether the cut is before ``place``, not after it.
    """
    if whole := next((name for name in called if place.startswith(name + ".")), None):
        return whole
    numbers = [depth for depth, part in enumerate(place.split(".")) if part.isdigit()]
    layer = ".".join(place.split(".")[: numbers[-1] + 1]) if numbers else place
    parts = [name for name in called if name.startswith(layer + ".")]
    return layer if place in parts and place != parts[0 if is_begin else -1] else None


def _has_region(module: nn.Module) -> str | None:
    """Parts that run in a mode are graphs of their own, which ``pipeline`` calls without their arguments."""
    for name, part in module.named_modules():
        if (graph := getattr(part, "graph", None)) is not None and any(map(_compat.is_region, graph.nodes)):
            return (
                f"module {name or '(root)'!r} has a part that runs without gradients, under autocast or checkpointed, "
                "and pipeline() cannot split around one. The first kind, as the rotary embeddings of Hugging Face's "
                "models, is none where the model is exported within torch.no_grad(); the program trains all the same"
            )
    return None
