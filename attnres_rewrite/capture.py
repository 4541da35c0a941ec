"""Captures a module's forward as one graph, without running it."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.errors import ExampleInputsError, GraphBreakError, NotRewrittenError
from attnres_rewrite.graph import is_inside, module_path, module_stack, normalise_path, source_line
from attnres_rewrite.passes import StreamAnalysis
from attnres_rewrite.patterns import through_transparent
from attnres_rewrite.pipeline import find_streams

ExampleInputs = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: Callable[..., Any]) -> Any:
        """Call ``model`` with these arguments."""
        return model(*self.args, **self.kwargs)


def example_call(model: nn.Module, example_inputs: ExampleInputs | None) -> Call:
    """The call that ``example_inputs`` stands for, or a default one made from the model.

    A mapping is keyword arguments, a tuple positional arguments, a tensor one positional argument.
    Tensors are moved to the model's device.

    Raises:
        ExampleInputsError: ``example_inputs`` is something else, or it is left out and the model does
            not say what it takes.
    """
    if example_inputs is None:
        example_inputs = _default_inputs(model)
    if isinstance(example_inputs, torch.Tensor):
        call = Call((example_inputs,), {})
    elif isinstance(example_inputs, Mapping):
        call = Call((), dict(example_inputs))
    elif isinstance(example_inputs, tuple):
        call = Call(example_inputs, {})
    else:
        raise ExampleInputsError(
            f"example_inputs is a {type(example_inputs).__name__}: pass a mapping (keyword arguments), "
            "a tuple (positional arguments) or a tensor (one positional argument)"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        return call
    return Call(*_compat.map_tensors(lambda t: t.to(parameter.device), (call.args, call.kwargs)))


def _default_inputs(model: nn.Module) -> ExampleInputs:
    main = getattr(model, "main_input_name", None)
    if main == "input_ids" and hasattr(model, "dummy_inputs"):
        return cast(ExampleInputs, model.dummy_inputs)
    config = getattr(model, "config", None)
    image_size: Any = getattr(config, "image_size", None)
    if main == "pixel_values" and image_size is not None:
        return {"pixel_values": _image(image_size, getattr(config, "num_channels", 3))}
    first = next((m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Embedding):
        return torch.arange(10).reshape(2, 5) % first.num_embeddings
    size: Any = next((m.image_size for m in model.modules() if hasattr(m, "image_size")), None)
    if isinstance(first, nn.Conv2d) and size is not None:
        return _image(size, first.in_channels)
    begins = f"begins with a {type(first).__name__}" if first is not None else "has no layer that tells"
    raise ExampleInputsError(
        f"cannot guess example inputs for {type(model).__name__}, which {begins}: pass example_inputs= a "
        "tensor, a tuple of positional arguments or a mapping of keyword arguments that the model runs on"
    )


def _image(size: int | tuple[int, int], channels: int) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)


class _Captured(Exception):
    """Carries the graph out of the call whose compilation produced it."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module


@dataclasses.dataclass(frozen=True)
class Capture:
    """The graphs of a model that hold its residual streams, and how they were captured.

    Attributes:
        modules: The graphs: one, or one for each of several towers between which the graph breaks.
        whole: Whether the call is one graph.
        scalars: Whether there is one graph only if ``tensor.item()`` and what is computed from it are taken into it;
            whoever runs the model must then do so too.
    """

    modules: tuple[GraphModule, ...]
    whole: bool = True
    scalars: bool = False


def capture(model: nn.Module, call: Call, streams: Sequence[str] | None = None) -> Capture:
    """The torch-level graph of ``model`` on ``call``, by Dynamo, on fake tensors: nothing is computed.

    Where the call breaks into several graphs even with scalars taken into them, those that hold residual
    streams; a model with breaks is run for real, under a copied random state.

    Args:
        model: What to capture.
        call: What it is called with.
        streams: The owners of the streams that are wanted, as in :class:`AttnResConfig`: the graph may break within
            the others.

    Raises:
        GraphBreakError: A graph break lies between layers.
        ExampleInputsError: The model does not run on these inputs.
        NotRewrittenError: ``torch.compile`` is switched off, so nothing can be captured.
    """
    if _compat.compile_disabled():
        raise NotRewrittenError(
            "torch.compile is switched off (TORCH_COMPILE_DISABLE=1 or torch._dynamo.config.disable), and "
            "AttnRes runs through it: switch it on again, or rewrite an ExportedProgram instead"
        )

    try:
        return Capture((capture_whole(model, call),))
    except ExampleInputsError:
        raise
    except Exception:
        _run_plainly(model, call)
    try:
        # Once more: some models set themselves up in their first call, in ways that Dynamo cannot trace.
        return Capture((capture_whole(model, call),))
    except _compat.graph_break_types() as error:
        # Not in the first place: what a user's own torch.compile takes for one graph should be one without it.
        with contextlib.suppress(Exception):
            return Capture((capture_whole(model, call, scalars=True),), scalars=True)
        return Capture(_capture_around_breaks(model, call, streams, error), whole=False)
    except Exception as error:
        raise GraphBreakError(f"Dynamo cannot trace {type(model).__name__}: {error}") from error


def capture_whole(model: nn.Module, call: Call, *, scalars: bool = False) -> GraphModule:
    """The graph of ``model`` on ``call``; raises whatever Dynamo does where it is not one graph.

    Args:
        model: What to capture.
        call: What it is called with.
        scalars: As in :func:`compiled`.

    Raises:
        ExampleInputsError: The call computes nothing.
    """

    def stop(module: GraphModule, _: list[Any]) -> Callable[..., NoReturn]:
        def stopped(*_: Any) -> NoReturn:
            raise _Captured(module)

        return stopped

    try:
        with _without_cache_on_meta(model):
            call.run(compiled(model, stop, one_graph=True, scalars=scalars))
    except _Captured as captured:
        return captured.module
    raise ExampleInputsError(f"{type(model).__name__} computes nothing from these example inputs")


def compiled(
    function: Callable[..., Any], backend: Callable[..., Any], *, one_graph: bool = False, scalars: bool = False
) -> Callable[..., Any]:
    """``function`` compiled for one use: no cache shared with other models, no fused kernel that hides adds.

    Args:
        function: What to compile.
        backend: What is given the graphs.
        one_graph: Raise at the first graph break. Not by ``fullgraph``, which also captures what breaks the graph
            without it, such as ``tensor.tolist()``: then a model could be captured that does not run.
        scalars: Take ``tensor.item()`` into the graph.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _compat.refusing_graph_breaks(one_graph):
            return _compat.unfused(function, *args, **kwargs)

    _compat.ignore_logged_warnings()
    call = torch.compile(_compat.with_own_code(forward), backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _compat.capturing_scalars(scalars):
            return call(*args, **kwargs)

    return run


@contextlib.contextmanager
def _without_cache_on_meta(model: nn.Module) -> Iterator[None]:
    """Hugging Face's key-value cache makes tensors that Dynamo cannot follow where the model is on meta."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()] if on_meta else []
    caching = [config for config in configs if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def without_traces(model: nn.Module) -> Iterator[None]:
    """Whatever runs in this context leaves the model's buffers and the random state as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _run_plainly(model: nn.Module, call: Call) -> None:
    """Run the model without Dynamo, to tell wrong inputs from a forward that cannot be traced."""
    try:
        with without_traces(model):
            call.run(model)
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} does not run on the example inputs {_describe(call)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _describe(call: Call) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return type(value).__name__

    named = [*map(one, call.args), *(f"{name}={one(value)}" for name, value in call.kwargs.items())]
    return f"({', '.join(named)})"


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
        steps = {s.node for stream in self.analysis.streams for branch in stream.branches for s in branch.steps}
        nodes: Any = self.module.graph.output_node().args[0]
        pairs = [(n, value) for n, value in zip(nodes, self.outputs, strict=True) if isinstance(n, Node)]
        return [value for n, value in pairs if through_transparent(n) in steps]

    @functools.cached_property
    def begins_with(self) -> list[Any]:
        """The arguments that a stream begins with as they are."""
        roots = {through_transparent(stream.root) for stream in self.analysis.streams}
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return [a for n, a in zip(placeholders, self.arguments, strict=True) if n in roots]


def _capture_around_breaks(
    model: nn.Module, call: Call, streams: Sequence[str] | None, error: BaseException
) -> tuple[GraphModule, ...]:
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
