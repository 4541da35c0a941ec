"""Checks a rewritten model against its own plain residuals, on the weights that it has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call, ExampleInputs, as_it_was, example_call, without_traces
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.forms.anchor import Anchor
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.live import disabled, require_live, run_through
from attnres_rewrite.graph.nodes import GraphBuilder, tensor_of
from attnres_rewrite.inspection.wide import WideInterpreter
from attnres_rewrite.passes import Site, SiteParameters
from attnres_rewrite.passes.reads_without_norm import explanation, reads_without_norm

# In float64 two orders of summing differ by 1e-12 after many layers; what a branch adds is worth more.
_TOLERANCE = 1e-8
# Where an operator has no float64, multiples of the epsilon of its dtype.
_TOLERANCE_IN_EPSILONS = 4.0


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a rewritten model with zero queries is from its plain residual path. True if it passed.

    Both are computed in float64, whatever the model's dtype is, so that a term that is missing cannot pass for
    rounding.

    Attributes:
        sites: Number of AttnRes sites that ran.
        sum_difference: Largest difference of any output, relative to the output's largest value, with
            ``aggregation="sum"``: the sources then add up to exactly the plain stream.
        difference: The same with the model's own form, gates at zero. With ``"mean"`` the stream is smaller by
            the number of sources, which of the norms that read it only the epsilon can notice (with ``"add"`` larger).
            With ``value_norm`` the model is another one.
        aggregation: The model's own aggregation.
        tolerance: What ``sum_difference`` may be: 1e-8, or more where an operator has no float64.
        without_norm: Where a read is not followed by a norm: with ``"mean"`` or ``"add"`` the model then is not what
            it was, and ``difference`` is judged too. With gates or ``value_norm`` it is not asked.
    """

    sites: int
    sum_difference: float
    difference: float
    aggregation: str
    tolerance: float
    without_norm: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the rewritten model computes, with zero queries, what the plain one does."""
        scaled = self.aggregation != "sum" and bool(self.without_norm)
        return self.sum_difference <= self.tolerance and not (scaled and self.difference > self.tolerance)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        text = (
            f"verification {verdict}: {self.sites} sites, zero queries against plain residuals: relative "
            f'difference {self.sum_difference:.1e} with aggregation="sum" (tolerance {self.tolerance:.1e}), '
            f'{self.difference:.1e} with the model\'s own aggregation="{self.aggregation}"'
        )
        if self.aggregation != "sum" and self.without_norm:
            text += f"; {explanation(self.without_norm)}"
        return text


class _Run:
    """The graphs of one call, run in float64.

    Attributes:
        wide: The float64 outputs of every graph that ran.
        narrow: The same in the dtypes that the graphs have, as the rest of the model takes them.
    """

    def __init__(self, plain: _Run | None = None) -> None:
        self.plain = plain
        self.wide: list[list[Any]] = []
        self.narrow: list[list[Any]] = []
        self.narrowest = torch.float64

    def compile(self, module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        """What runs ``module`` and keeps its outputs; a backend for ``torch.compile``."""
        traced = [tensor_of(node) for node in module.graph.output_node().args[0]]  # type: ignore[union-attr]

        def run(*arguments: Any) -> Any:
            interpreter = WideInterpreter(module)
            wide = list(interpreter.run(*arguments))
            self.narrowest = max(self.narrowest, interpreter.narrowest, key=lambda dtype: torch.finfo(dtype).eps)
            narrow = [v if t is None else v.to(t.dtype) for v, t in zip(wide, traced, strict=True)]
            self.wide.append(wide)
            self.narrow.append(narrow)
            number = len(self.narrow) - 1
            # What follows this graph goes on from the same values in both runs, so no rounding adds up.
            follows = self.plain is not None and number < len(self.plain.narrow)
            return tuple(self.plain.narrow[number] if follows else narrow)  # type: ignore[union-attr]

        return run

    def forget(self) -> None:
        """Drop the outputs: Dynamo keeps what it compiled, and so this, for longer."""
        self.wide.clear()
        self.narrow.clear()

    def difference_to_plain(self) -> float:
        """The largest relative difference of any output of any graph; infinite if other graphs ran."""
        assert self.plain is not None
        if len(self.wide) != len(self.plain.wide):
            return math.inf
        pairs = zip(self.wide, self.plain.wide, strict=True)
        compared = ((_compat.tensors_in(own), _compat.tensors_in(plain)) for own, plain in pairs)
        return max((relative_difference(*pair) for pair in compared), default=0.0)


class _VerifyingBackend(AttnResBackend):
    def __init__(self, run: _Run, aggregation: str | None) -> None:
        super().__init__(run.compile)
        self.run, self.aggregation = run, aggregation
        self.used, self.asks_for_norms = "", False
        self.sites = 0
        self.without_norm: list[str] = []

    def site_parameters(self, module: GraphModule, anchor: Anchor) -> list[SiteParameters]:
        # Not in the parameters themselves, with which other threads compute.
        build = GraphBuilder(module)

        def zero(node: Node) -> Node:
            return build.call(torch.ops.aten.zeros_like.default, node, like=anchor.node)

        with module.graph.inserting_after(anchor.node):
            return [
                # With the sum for its form, a read is the plain stream at any gate.
                SiteParameters(zero(p.query), p.gain, zero(p.gate) if p.gate and not self.aggregation else p.gate)
                for p in anchor.parameters
            ]

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        aggregation: Any = self.aggregation or config.aggregation
        self.used, self.asks_for_norms = aggregation, not (config.starts_plain or config.value_norm)
        return dataclasses.replace(
            config, aggregation=aggregation, value_norm=config.value_norm and self.aggregation is None
        )

    def inserted(self, sites: list[Site]) -> None:
        self.sites += len(sites)
        self.without_norm += reads_without_norm(site.read for site in sites) if self.asks_for_norms else []


def verify(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Verification:
    """Compare the rewritten ``model``, with zeros in the place of its queries, with plain residuals.

    Both run on the weights, in the mode (train or eval) and with the random state that the model has
    now. The model itself is not changed, its buffers neither: other threads may run it meanwhile.

    Args:
        model: A rewritten ``nn.Module``.
        example_inputs: As for :func:`attnres_rewrite.rewrite`.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
    """
    require_live(model, "verify")
    call = example_call(model, example_inputs)
    plain = _Run()
    with disabled(model):
        _run(model, call, AttnResBackend(plain.compile))
    summing, own = _VerifyingBackend(_Run(plain), "sum"), _VerifyingBackend(_Run(plain), None)
    for backend in (summing, own):
        _run(model, call, backend)
    differences = summing.run.difference_to_plain(), own.run.difference_to_plain()
    for run in (plain, summing.run, own.run):
        run.forget()
    narrowest = max(plain.narrowest, summing.run.narrowest, key=lambda dtype: torch.finfo(dtype).eps)
    wide = narrowest == torch.float64
    return Verification(
        sites=summing.sites,
        sum_difference=differences[0],
        difference=differences[1],
        aggregation=own.used,
        tolerance=_TOLERANCE if wide else _TOLERANCE_IN_EPSILONS * torch.finfo(narrowest).eps,
        without_norm=tuple(dict.fromkeys(own.without_norm)),
    )


def _run(model: nn.Module, call: Call, backend: AttnResBackend) -> None:
    with as_it_was(model), without_traces(model):
        run_through(model, call.run, backend)


def relative_difference(outputs: list[Tensor], references: list[Tensor]) -> float:
    """Largest difference of any two tensors, relative to the largest value of the reference; infinite for NaN.

    Infinite also where shapes differ. Of integers it is the share of those that differ.
    """
    largest = 0.0
    for output, reference in zip(outputs, references, strict=True):
        if output.shape != reference.shape:
            return math.inf
        if reference.numel() == 0:
            continue
        if not reference.is_floating_point():
            largest = max(largest, (output != reference).double().mean().item())
            continue
        finite = reference[reference.isfinite()]
        scale = (finite.abs().max().item() if finite.numel() else 0.0) or 1.0
        output = output.to(reference.dtype)
        # Infinities, as in masked scores, are no difference where both have them.
        difference = torch.where(output == reference, 0.0, (output - reference).abs()).max().item() / scale
        if math.isnan(difference):
            return math.inf
        largest = max(largest, difference)
    return largest
