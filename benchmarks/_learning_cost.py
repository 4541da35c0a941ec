"""What one contestant of `benchmarks/learning.py` costs: parameters, memory traffic, and the time of its steps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from _chain import moved_bytes
from _learning import STREAMS, VOCABULARY, Size
from _learning_lane import Lane
from _learning_model import build, new_model
from _peers import reason
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile

from attnres_rewrite.bench import StepTimes
from attnres_rewrite.bench.forms import randomise_queries
from attnres_rewrite.bench.timing import interleave, warm_up
from attnres_rewrite.bench.workload import CannotDecode, Workload, decode_step, filled_cache, inference_step
from attnres_rewrite.capture.inputs import Call

# In tensors of the stream: a plain sublayer reads x and f(x) and writes their sum; backward likewise with gradients.
PLAIN_RESIDUAL = {"forward": 3.0, "forward+backward": 6.0}
# A round is a step of either form.
ROUNDS = {"training": 24, "prefill": 40, "decode": 100}
WARM_UP = 3
CPU = torch.device("cpu")

Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Form:
    """A contestant with random queries, if it has any, since zeros could hide work."""

    name: str
    size: Size
    model: nn.Module
    call: nn.Module

    @classmethod
    def make(cls, name: str, size: Size, *, in_one: bool = False) -> Form:
        """Build it; what it runs first is compiled then."""
        model, call = build(name, size, CPU, in_one=in_one)
        randomise_queries(model)
        return cls(name, size, model, call)

    @property
    def parameters(self) -> int:
        """How many numbers it learns."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def training(self) -> Step:
        """A step of the study, at a learning rate of zero, which costs the same."""
        lane = Lane(self.model, self.call.train(), self.name, self.size)
        batch, rates = tokens_of(self.size), torch.zeros_like(lane.rates)
        return lambda: lane.step(batch, rates)

    def prefill(self) -> Step:
        """The forward of a batch without gradients."""
        return inference_step(self.call.eval(), workload_of(self.size))

    def decode(self, plain: Form) -> Step:
        """A token for every sequence of a batch, whose others are in a cache that the plain model has filled."""
        self.call.eval()
        if self.name in STREAMS:
            see_that_a_cache_is_used(self.name, self.size)
        torch.manual_seed(0)
        cache, ids = filled_cache(plain.model, workload_of(self.size), self.size.length - 1)
        return decode_step(self.call, copy.deepcopy(cache), ids)


def tokens_of(size: Size) -> Tensor:
    """Token ids ``[batch, length]``, int64."""
    return torch.randint(VOCABULARY, (size.batch, size.length), generator=torch.Generator().manual_seed(0))


def workload_of(size: Size) -> Workload:
    """The inputs of a forward."""
    inputs = {"input_ids": tokens_of(size)}
    return Workload(Call((), inputs | {"use_cache": False}), None, inputs)


@torch.no_grad()
def see_that_a_cache_is_used(name: str, size: Size) -> None:
    """Compare the last token's logits with and without a cache, for a form whose package knows of none.

    Raises:
        CannotDecode: They differ.
    """
    model, tokens = new_model(name, size, 0).eval(), tokens_of(size)[:2]
    whole = model(input_ids=tokens).logits[:, -1]
    cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    off = (last - whole).abs().max() / whole.abs().max()
    if off > 1e-4:
        raise CannotDecode(f"with a cache its logits are off by {off:.1g} of the largest")


def moved_tensors(name: str, size: Size) -> dict[str, Any]:
    """What the model reads and writes by Inductor's count, in tensors ``[batch, length, width]`` a sublayer.

    Returns:
        ``parameters``, how many there are; ``tensors`` of a forward without gradients, and of a forward with the loss
        and its backward.
    """
    torch.compiler.reset()
    # Of a layer that is compiled once, one call would be counted.
    form, tokens = Form.make(name, size, in_one=True), tokens_of(size)
    steps: dict[str, Step] = {
        "forward": form.prefill(),
        "forward+backward": lambda: form.call.train()(input_ids=tokens, labels=tokens).loss.backward(),
    }
    stream = tokens.numel() * size.width * torch.float32.itemsize
    with _kernels_that_do_nothing():
        moved = {phase: round(moved_bytes(step) / stream / (2 * size.layers), 3) for phase, step in steps.items()}
    return {"parameters": form.parameters, "tensors": moved}


@contextlib.contextmanager
def _kernels_that_do_nothing() -> Iterator[None]:
    """Let Inductor write its kernels and not compile them: how long a compiler takes is no matter for what they are."""
    with unittest.mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *_: None):
        yield


def residual_tensors(moved: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, float]:
    """Of what a model moves, the part of its residual connection: what is not the plain model's, and what is there."""
    return {phase: round(moved[phase] - plain[phase] + least, 2) for phase, least in PLAIN_RESIDUAL.items()}


def step_times(name: str, size: Size, rounds: Mapping[str, int] = ROUNDS) -> dict[str, Any]:
    """Steps of a contestant and of the plain model in turn; of the plain one beside itself for what noise does.

    Returns:
        ``parameters`` of the contestant; ``steps``, by kind the medians in milliseconds and that of the ratios of the
        rounds, with their first and last decile; ``skipped``, the kinds that the contestant cannot do, with the reason.
    """
    plain, other = Form.make("plain", size), Form.make(name, size)
    steps, skipped = {}, {}
    for kind in rounds:
        # Dynamo keeps so many graphs of a function only: the form that came to that limit would run eagerly.
        torch.compiler.reset()
        given = (plain,) if kind == "decode" else ()
        try:
            pair = {"plain": getattr(plain, kind)(*given), "rewritten": getattr(other, kind)(*given)}
            warm_up(pair, WARM_UP)
        except Exception as error:
            skipped[kind] = reason(error)
            continue
        steps[kind] = figures(interleave(pair, CPU, rounds=rounds[kind]))
    return {"parameters": other.parameters, "steps": steps, "skipped": skipped}


def figures(times: StepTimes) -> dict[str, float | int]:
    """What is written down of the times of one kind of step."""
    low, high = times.spread
    return {
        "plain_ms": round(times.plain_ms, 3),
        "ms": round(times.rewritten_ms, 3),
        "ratio": round(times.ratio, 3),
        "ratio_p10": round(low, 3),
        "ratio_p90": round(high, 3),
        "rounds": len(times.ratios),
        "recompiled": times.recompiled,
    }
