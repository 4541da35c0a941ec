"""Captures a module's forward as one graph, without running it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from torch import nn
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.capture.graph_breaks import capture_around_breaks
from attnres_rewrite.capture.inputs import Call, compiled, run_plainly
from attnres_rewrite.errors import ExampleInputsError, GraphBreakError, NotRewrittenError


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
        run_plainly(model, call)
    try:
        # Once more: some models set themselves up in their first call, in ways that Dynamo cannot trace.
        return Capture((capture_whole(model, call),))
    except _compat.graph_break_types() as error:
        # Not in the first place: what a user's own torch.compile takes for one graph should be one without it.
        with contextlib.suppress(Exception):
            return Capture((capture_whole(model, call, scalars=True),), scalars=True)
        return Capture(capture_around_breaks(model, call, streams, error), whole=False)
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
