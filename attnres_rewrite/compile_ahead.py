"""The calls that are to come are compiled before they come."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call, ExampleInputs, as_it_was, example_call, without_traces
from attnres_rewrite.errors import ExampleInputsError
from attnres_rewrite.forms.live import require_live

Mode = Literal["train", "eval"]
_logger = logging.getLogger(__name__)


def warm_up(
    model: nn.Module,
    inputs: ExampleInputs | Sequence[ExampleInputs],
    *,
    modes: Sequence[Mode] = ("train", "eval"),
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
) -> None:
    """Compile the calls of a rewritten model ahead, so that none of them waits for the compiler later.

    A rewritten model is compiled when it is called: once for training, once for calls without gradients, once for the
    first inputs of another size, after which that size is dynamic, and once more for each dimension of size 1. With
    Inductor each takes from seconds to minutes. Here all of that is done at once. Weights, gradients, buffers, modes
    and random state are as before.

    Args:
        model: A model that was rewritten in place.
        inputs: Example inputs, or a list of them, as for :func:`attnres_rewrite.rewrite`; one for every size that is to
            come, in the order in which they will come. Calls under ``torch.autocast`` are warmed up under it.
        modes: ``"train"``: forward in train mode and backward. ``"eval"``: forward in eval mode under
            ``torch.no_grad()``, as ``Trainer`` evaluates and ``generate()`` runs.
        loss: What makes a scalar of the model's output, for the backward. Left out, it is ``output.loss`` where the
            output has one, else the sum of all that requires gradients.
        progress: Whether to show a bar on standard error, where that is a terminal and rich is installed (extra
            ``cli``). What was compiled is logged in any case.

    Raises:
        AttnResError: ``model`` was not rewritten in place; or what its first call raises.
        ExampleInputsError: There are no inputs, or they are of the wrong kind.
        ValueError: A mode is neither ``"train"`` nor ``"eval"``.
    """
    require_live(model, "warm_up")
    if unknown := [mode for mode in modes if mode not in ("train", "eval")]:
        raise ValueError(f"modes of warm_up are 'train' and 'eval', not {unknown[0]!r}")
    examples = list(inputs) if isinstance(inputs, list) else [inputs]
    if not examples:
        raise ExampleInputsError("warm_up has no inputs: give it one for every size that is to come")
    calls = [example_call(model, one) for one in examples]  # type: ignore[arg-type]
    with _gradients_as_they_were(model), as_it_was(model), without_traces(model):
        for mode, call in _shown(list(itertools.product(modes, calls)), progress):
            begun, graphs = time.perf_counter(), _compat.graphs_compiled()
            _run(model, call, mode, loss)
            _logger.info(
                "%s call %s: %d graphs compiled in %.1f s",
                mode,
                [tuple(t.shape) for t in _compat.tensors_in((call.args, call.kwargs))],
                _compat.graphs_compiled() - graphs,
                time.perf_counter() - begun,
            )


def _run(model: nn.Module, call: Call, mode: Mode, loss: Callable[[Any], Tensor] | None) -> None:
    model.train(mode == "train")
    if mode == "eval":
        call.run(model)
        return
    with torch.enable_grad():
        output = call.run(model)
        value = loss(output) if loss is not None else _any_loss(output)
        if value is not None:
            value.backward()


def _any_loss(output: Any) -> Tensor | None:
    if isinstance(own := getattr(output, "loss", None), Tensor):
        return own
    total = [tensor.sum() for tensor in _compat.tensors_in(output) if tensor.requires_grad]
    return torch.stack(total).sum() if total else None


@contextlib.contextmanager
def _gradients_as_they_were(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        # Not added to: another step may be accumulating.
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _shown(calls: list[tuple[Mode, Call]], progress: bool) -> Iterator[tuple[Mode, Call]]:
    """``calls``, with a bar that goes on with every one of them."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from calls
        return
    console = Console(stderr=True)
    yield from track(calls, "compiling", console=console, disable=not (progress and console.is_terminal))
