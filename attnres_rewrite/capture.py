"""Captures a module's forward as one graph, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.errors import ExampleInputsError, GraphBreakError, NotRewrittenError
from attnres_rewrite.graph import module_stack
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


def capture(model: nn.Module, call: Call) -> GraphModule:
    """The torch-level graph of ``model`` on ``call``, by Dynamo, on fake tensors: nothing is computed.

    Where the call breaks into several graphs, the one that holds the residual streams; a model with
    breaks is run for real, under a copied random state.

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

    def stop(module: GraphModule, _: list[Any]) -> Callable[..., NoReturn]:
        def stopped(*_: Any) -> NoReturn:
            raise _Captured(module)

        return stopped

    try:
        _compiled(model, stop, fullgraph=True)(*call.args, **call.kwargs)
    except _Captured as captured:
        return captured.module
    except Exception as error:
        _run_plainly(model, call)
        if not isinstance(error, _compat.graph_break_types()):
            raise GraphBreakError(f"Dynamo cannot trace {type(model).__name__}: {error}") from error
        return _capture_around_breaks(model, call, error)
    raise ExampleInputsError(f"{type(model).__name__} computes nothing from these example inputs")


def _compiled(model: nn.Module, backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _compat.unfused(model, *args, **kwargs)

    return torch.compile(_compat.with_own_code(forward), backend=backend, **options)


def _run_plainly(model: nn.Module, call: Call) -> None:
    """Run the model without Dynamo, to tell wrong inputs from a forward that cannot be traced."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            call.run(model)
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} does not run on the example inputs {_describe(call)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _describe(call: Call) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return type(value).__name__

    named = [*map(one, call.args), *(f"{name}={one(value)}" for name, value in call.kwargs.items())]
    return f"({', '.join(named)})"


def _capture_around_breaks(model: nn.Module, call: Call, error: Exception) -> GraphModule:
    graphs: list[GraphModule] = []

    def collect(module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    with torch.random.fork_rng(), torch.no_grad():
        _compiled(model, collect)(*call.args, **call.kwargs)
    found = [(graph, streams) for graph in graphs if (streams := find_streams(graph).streams)]
    if len(found) == 1 and not any(_shares_layers(found[0][0], other) for other in graphs if other is not found[0][0]):
        return found[0][0]
    raise GraphBreakError(
        f"the forward of {type(model).__name__} breaks into {len(graphs)} graphs, and a residual stream "
        f"runs through more than one of them, so it cannot be rewritten. Remove the graph break: {error}"
    ) from error


def _shares_layers(streams: GraphModule, other: GraphModule) -> bool:
    """Whether ``other`` runs a layer of a list of modules whose layers also run in ``streams``."""
    return bool(_lists(streams) & _lists(other))


def _lists(module: GraphModule) -> set[str]:
    paths = {path for node in module.graph.nodes for path in module_stack(node)}
    return {path.rsplit(".", 1)[0] for path in paths if path.rsplit(".", 1)[-1].isdigit()}
