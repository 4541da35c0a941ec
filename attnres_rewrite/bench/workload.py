"""What both forms of a model are given: inputs, labels, a filled key-value cache."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.bench.settings import BenchSettings
from attnres_rewrite.capture.inputs import Call, ExampleInputs, example_call
from attnres_rewrite.errors import ExampleInputsError

BATCH, LENGTH = 2, 256

Step = Callable[[], object]


class CannotDecode(Exception):
    """A model takes no key-value cache that could be filled; the message says why."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """The inputs of a model.

    Attributes:
        call: What the model is called with.
        labels: Token ids ``[B, T]`` whose cross entropy is the loss, where the model computes one from ``labels=``;
            else the loss is the mean of the squares of the outputs.
        example_inputs: The same inputs as :func:`attnres_rewrite.rewrite` takes them.
    """

    call: Call
    labels: Tensor | None
    example_inputs: ExampleInputs

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Sizes of the tensors, by the name or the position of the argument."""
        named = {**{str(i): value for i, value in enumerate(self.call.args)}, **self.call.kwargs}
        return {name: list(value.shape) for name, value in named.items() if isinstance(value, Tensor)}


def make_workload(model: nn.Module, example_inputs: ExampleInputs | None, settings: BenchSettings) -> Workload:
    """The inputs for ``model``, on its device; it runs on them once, as it is.

    Args:
        model: The plain model, not compiled.
        example_inputs: As :func:`attnres_rewrite.rewrite` takes them. Token ids, and masks over them, are made anew
            where ``settings`` say a size, and where ``None`` leaves them to be guessed.
        settings: Sizes, dtype and seed.

    Raises:
        ExampleInputsError: There are no inputs, they hold no tokens whose number could be chosen, or the model does
            not run on them.
    """
    torch.manual_seed(settings.seed)
    call = example_call(model, example_inputs)
    if example_inputs is None or settings.batch is not None or settings.length is not None:
        call = _resized(model, call, settings, chosen=example_inputs is not None)
    if settings.dtype is not None:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        arguments = (call.args, call.kwargs)
        call = Call(*_compat.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, arguments))
    example = call.kwargs or call.args
    if _takes(model, "use_cache"):
        # A cache that nobody reads again would be memory and time for nothing; decode steps have theirs.
        call = Call(call.args, {**call.kwargs, "use_cache": False})
    return Workload(call, _labels(model, _run_plainly(model, call), settings), example)


def _resized(model: nn.Module, call: Call, settings: BenchSettings, *, chosen: bool) -> Call:
    """``call`` with tokens of the wanted batch and length in the place of those that it has."""

    def is_tokens(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()

    def resized(name: str, value: Any) -> Any:
        if not is_tokens(value):
            return value
        given = value.shape if chosen else (BATCH, _default_length(model))
        size = (settings.batch or given[0], settings.length or given[1])
        if "mask" in name:
            return torch.ones(size, dtype=value.dtype, device=value.device)
        return torch.randint(vocabulary(model), size, dtype=value.dtype, device=value.device)

    if not any(map(is_tokens, (*call.args, *call.kwargs.values()))):
        if settings.batch is None and settings.length is None:
            return call
        raise ExampleInputsError(
            f"batch={settings.batch} and length={settings.length} are for models of tokens, and the inputs of "
            f"{type(model).__name__} hold no integers [batch, length]: leave them out and give example inputs of the "
            "wanted size, which a module:factory returns as (model, example_inputs)"
        )
    args = tuple(resized("", value) for value in call.args)
    return Call(args, {name: resized(name, value) for name, value in call.kwargs.items()})


def _default_length(model: nn.Module) -> int:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH


def vocabulary(model: nn.Module) -> int:
    """Number of tokens that ``model`` knows: what its configuration says, or else the size of its first embedding."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    first = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    return size if isinstance(size, int) else first


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


@torch.no_grad()
def _run_plainly(model: nn.Module, call: Call) -> Any:
    """The output of the forward of ``model`` as it was written, not compiled."""
    try:
        return call.run(model.forward)
    except Exception as error:
        sizes = ", ".join(str(list(t.shape)) for t in _compat.tensors_in((call.args, call.kwargs)))
        raise ExampleInputsError(
            f"{type(model).__name__} does not run on inputs of sizes {sizes}: {type(error).__name__}: "
            f"{error or 'no message'}. Choose another batch or length, or give example inputs that it runs on"
        ) from error


def _labels(model: nn.Module, output: Any, settings: BenchSettings) -> Tensor | None:
    """Labels for a model that takes some and whose logits are over its vocabulary; ``None`` for others."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not _takes(model, "labels"):
        return None
    if logits.ndim != 3 or logits.shape[-1] != vocabulary(model):
        return None
    torch.manual_seed(settings.seed)
    return torch.randint(logits.shape[-1], logits.shape[:-1], device=logits.device)


def training_step(model: nn.Module, workload: Workload) -> Step:
    """Forward, loss, backward, and a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    call, labels = workload.call, workload.labels
    if labels is not None:
        call = Call(call.args, {**call.kwargs, "labels": labels})

    def step() -> None:
        output = call.run(model)
        loss = output.loss if labels is not None else _mean_square(output)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _mean_square(output: Any) -> Tensor:
    floats = [t for t in _compat.tensors_in(output) if t.is_floating_point()]
    return torch.stack([t.float().square().mean() for t in floats]).sum()


def inference_step(model: nn.Module, workload: Workload) -> Step:
    """A forward without gradients."""
    return torch.no_grad()(lambda: workload.call.run(model))


def decode_step(model: nn.Module, cache: Any, ids: Tensor) -> Step:
    """A forward of one token a sequence with a filled cache, without gradients.

    Args:
        model: The model.
        cache: Of :func:`filled_cache`; every step sees it as it is now, whatever the one before it appended.
        ids: Token ids ``[B, 1]``.
    """
    # A layer of the cache appends by putting new tensors in the place of the old ones, so that these can be put back.
    saved = [dict(vars(layer)) for layer in cache.layers]

    @torch.no_grad()
    def step() -> object:
        for layer, state in zip(cache.layers, saved, strict=True):
            vars(layer).update(state)
        return model(input_ids=ids, past_key_values=cache, use_cache=True)

    return step


def filled_cache(model: nn.Module, workload: Workload, cached: int) -> tuple[Any, Tensor]:
    """The key-value cache after a prompt, and the tokens ``[B, 1]`` that come next.

    Args:
        model: The plain model.
        workload: Its inputs, of which the batch is taken.
        cached: Tokens of the prompt.

    Raises:
        CannotDecode: The model takes no such cache, or gives none.
    """
    name = type(model).__name__
    missing = [argument for argument in ("input_ids", "past_key_values", "use_cache") if not _takes(model, argument)]
    if missing:
        raise CannotDecode(f"the forward of {name} takes no {', '.join(missing)}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CannotDecode(f"{name} has an encoder, and only models that are a decoder are timed token by token")
    batch = next(iter(workload.sizes.values()))[0]
    device = next(model.parameters()).device
    prompt = torch.randint(vocabulary(model), (batch, cached + 1), device=device)
    try:
        cache = _run_plainly(model, Call((), {"input_ids": prompt[:, :-1], "use_cache": True})).past_key_values
    except (ExampleInputsError, AttributeError) as error:
        raise CannotDecode(f"no key-value cache of {cached} tokens could be filled: {error}") from error
    if not getattr(cache, "layers", None):
        raise CannotDecode(f"{name} returned {type(cache).__name__} for a key-value cache, which has no layers")
    return cache, prompt[:, -1:]
