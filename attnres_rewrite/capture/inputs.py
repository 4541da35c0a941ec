"""The call that a model is traced or checked with, and running it without leaving traces."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.errors import ExampleInputsError

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


@contextlib.contextmanager
def without_traces(model: nn.Module) -> Iterator[None]:
    """Whatever runs in this context leaves the model's buffers and the random state as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                # Nothing is written to a buffer that has not changed: another thread may be using it. Its version does
                # not tell, because batch norm writes without counting.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def as_it_was(model: nn.Module, *, after_errors_only: bool = False) -> Iterator[None]:
    """After the context the attributes of the modules of ``model`` are what they were: counters, lists, registrations.

    What is inside other objects than lists, dictionaries and sets is not looked into.

    Args:
        model: The model.
        after_errors_only: Whether what the context has changed stays, unless it ends with an error.
    """
    before = [
        (m, dict(m.__dict__), [(v, v.copy()) for v in m.__dict__.values() if type(v) in _CONTAINERS])
        for m in model.modules()
    ]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not after_errors_only:
            for module, attributes, containers in before:
                _put_back(module.__dict__, attributes)
                for container, contents in containers:
                    if not _holds(container, contents):
                        container.clear()
                        getattr(container, "extend" if isinstance(container, list) else "update")(contents)


def _holds(container: Any, contents: Any) -> bool:
    """Whether the same objects are in both, in the same order."""
    parts = [(c.items() if isinstance(c, dict) else enumerate(c)) for c in (container, contents)]
    ids = [[(key, id(value)) for key, value in part] for part in parts]
    return ids[0] == ids[1]


_CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, list, set)


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name) is not value or name not in attributes:
            attributes[name] = value


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the context no module of ``model`` is compiled by its user's ``module.compile()`` or ``torch.compile``."""
    taken = take_compilation(list(model.modules()))
    try:
        yield
    finally:
        give_back_compilation(taken)


# Module, the attribute or None for what a call of it runs, and the value.
Taken = list[tuple[nn.Module, str | None, Any]]


def take_compilation(modules: Sequence[nn.Module]) -> Taken:
    """Take off what a user has compiled of ``modules`` themselves: by ``module.compile()``, or as their ``forward``."""
    taken: Taken = []
    for module in modules:
        if (call := _compat.compiled_call(module)) is not None:
            taken.append((module, None, call))
            _compat.set_compiled_call(module, None)
        forward = module.__dict__.get("forward")
        original = _compat.compiled_function(forward)
        if original is not None:
            taken.append((module, "forward", forward))
            del module.__dict__["forward"]
            if original != module.forward:
                module.__dict__["forward"] = original
    return taken


def give_back_compilation(taken: Taken) -> None:
    """Undo :func:`take_compilation`."""
    for module, name, value in taken:
        if name is None:
            _compat.set_compiled_call(module, value)
        else:
            module.__dict__[name] = value


def run_plainly(model: nn.Module, call: Call) -> None:
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

    call = torch.compile(_compat.with_own_code(forward), backend=backend, **_compat.isolated_compile_options())

    def run(*args: Any, **kwargs: Any) -> Any:
        with _compat.tracing_settings(scalars), _compat.without_recompile_limit():
            return call(*args, **kwargs)

    return run
