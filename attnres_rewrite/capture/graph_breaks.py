"""Where a call breaks into several graphs: which of them hold whole residual streams."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call, compiled, without_traces
from attnres_rewrite.errors import GraphBreakError
from attnres_rewrite.graph.nodes import is_inside, module_path, module_stack, normalise_path, source_line
from attnres_rewrite.passes import StreamAnalysis
from attnres_rewrite.patterns import through_transparent
from attnres_rewrite.pipeline import find_streams


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One run of one of the graphs of a call that breaks."""

    module: GraphModule
    arguments: tuple[Any, ...]
    outputs: tuple[Any, ...]
    analysis: StreamAnalysis

    def owners(self) -> list[str]:
        """The owners of its streams."""
        return [stream.owner for stream in self.analysis.streams]

    def adds(self) -> list[Node]:
        """An add of each of its streams, and those that are on none."""
        return [*(stream.branches[0].adds[0].node for stream in self.analysis.streams), *self.analysis.lone]

    @functools.cached_property
    def layer_lists(self) -> set[str]:
        """The lists of modules of which it runs a layer."""
        paths = {path for node in self.module.graph.nodes for path in module_stack(node)}
        return {path.rsplit(".", 1)[0] for path in paths if path.rsplit(".", 1)[-1].isdigit()}

    @functools.cached_property
    def stream_values(self) -> list[Any]:
        """The outputs that are values of a stream."""
        values = {v for stream in self.analysis.streams for v in stream.values - {stream.root}}
        nodes: Any = self.module.graph.output_node().args[0]
        pairs = [(n, value) for n, value in zip(nodes, self.outputs, strict=True) if isinstance(n, Node)]
        return [value for n, value in pairs if through_transparent(n) in values]

    @functools.cached_property
    def begins_with(self) -> list[Any]:
        """The arguments that a stream begins with as they are."""
        roots = {through_transparent(stream.root) for stream in self.analysis.streams}
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return [a for n, a in zip(placeholders, self.arguments, strict=True) if n in roots]


def capture_around_breaks(
    model: nn.Module, call: Call, streams: Sequence[str] | None, error: BaseException
) -> tuple[GraphModule, ...]:
    """The graphs of ``call`` that hold whole residual streams; the model is run for real, under a copied random state.

    Args:
        model: What to capture.
        call: What it is called with.
        streams: The owners of the streams that are wanted; the graph may break within the others.
        error: What Dynamo said of the break, for messages.

    Raises:
        GraphBreakError: A graph break lies between layers, or in the forward of an owner.
    """
    runs = _runs(model, call)
    whole = [run for run in runs if run.owners() and not any(_is_broken(run, other) for other in runs)]
    breaks = f"the forward of {type(model).__name__} breaks into {len(runs)} graphs, and "
    if not whole:
        raise GraphBreakError(
            f"{breaks}not one of them holds a whole residual stream, so none can be rewritten. Remove the graph "
            f"break: {error}"
        ) from error
    owners = [owner for run in whole for owner in run.owners()]
    for add in (add for run in runs if run not in whole for add in run.adds()):
        if streams is None or any(is_inside(module_path(add), owner) for owner in streams):
            raise GraphBreakError(
                f"{breaks}a residual stream is in several of them, with an add at {source_line(add)}, so it would "
                f"stay plain. To leave it so, and rewrite what is whole, name that: AttnResConfig(streams="
                f"{tuple(owners)}). Or remove the graph break: {error}"
            ) from error
    for owner in owners:
        if streams is None or owner in streams:
            _require_one_graph(model, owner, call)
    return tuple(run.module for run in whole)


def _is_broken(run: _Run, other: _Run) -> bool:
    """Whether the break between ``run`` and ``other`` may lie within a stream of ``run``."""
    if run is other:
        return False
    nested = any(is_inside(a, b) or is_inside(b, a) for a in run.owners() for b in other.owners())
    return nested or bool(run.layer_lists & other.layer_lists) or _goes_on(run, other) or _goes_on(other, run)


def _goes_on(run: _Run, later: _Run) -> bool:
    """Whether a stream of ``later`` begins with a value of one of ``run``."""
    ends = {id(value) for value in run.stream_values}
    return any(id(value) in ends for value in later.begins_with)


def _runs(model: nn.Module, call: Call) -> list[_Run]:
    """What is run of the graphs that ``call`` breaks into; layers that are alike share a graph, and run it in turn."""
    recorded: list[tuple[GraphModule, tuple[Any, ...], tuple[Any, ...]]] = []

    def record(module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            outputs = module.forward(*arguments)
            recorded.append((module, arguments, outputs))
            return outputs

        return run

    with without_traces(model):
        call.run(compiled(model, record))
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    runs = []
    for module, arguments, outputs in recorded:
        # A copy, because towers that are alike have names of their own in the graph that they share.
        graph = GraphModule(module, copy.deepcopy(module.graph))
        _add_prefix(model, graph, arguments, names)
        runs.append(_Run(graph, arguments, outputs, find_streams(graph)))
    # Dynamo keeps what it compiled, with the function above, as long as the code it came from, which may be a
    # library's. So the weights must not hang on that.
    recorded.clear()
    return runs


def _add_prefix(model: nn.Module, module: GraphModule, arguments: tuple[Any, ...], names: Mapping[int, str]) -> None:
    """Name the modules in a graph of one of the model's inner calls as the model does.

    After a graph break Dynamo starts anew in some inner forward, and names modules relative to it. Which
    one it is can be told by the parameters that the graph is called with: ``names`` has the modules of all, by id.
    """
    votes: collections.Counter[str] = collections.Counter()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for placeholder, argument in zip(placeholders, arguments, strict=True):
        known = names.get(id(argument))
        for inner in {module_path(user) for user in placeholder.users} if known is not None else ():
            if f".{known}".endswith(f".{inner}" if inner else ""):
                votes[f".{known}".removesuffix(f".{inner}" if inner else "").strip(".")] += 1
    prefix = votes.most_common(1)[0][0] if votes else ""
    root = {"": (prefix, type(model.get_submodule(prefix)))} if prefix else {}
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = root | {
            key: (f"{prefix}.{normalise_path(path)}".strip("."), *kind) for key, (path, *kind) in stack.items()
        }


def _require_one_graph(model: nn.Module, owner: str, call: Call) -> None:
    """Raise GraphBreakError unless the forward of the owner of a stream is one graph.

    A break beside the layers, but in the same forward, separates them from the AttnRes parameters too.
    """
    module = model.get_submodule(owner)
    before = module.__dict__.get("forward")
    module.forward = compiled(module.forward, lambda graph, _: graph.forward, one_graph=True)
    try:
        with without_traces(model):
            call.run(model)
    except _compat.graph_break_types() as error:
        raise GraphBreakError(
            f"a graph break lies in the forward of module {owner or '(root)'!r}, which runs the layers, so "
            f"these cannot be rewritten: remove it, or move what causes it out of that forward: {error}"
        ) from error
    finally:
        del module.forward
        if before is not None:
            module.forward = before
