"""Checks a rewritten model against its own plain residuals, on the weights that it has."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.anchor import Anchor
from attnres_rewrite.api import disabled, require_live
from attnres_rewrite.backend import AttnResBackend
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph import GraphBuilder
from attnres_rewrite.inputs import Call, ExampleInputs, example_call
from attnres_rewrite.live import run_through
from attnres_rewrite.passes import Site, SiteParameters

# Multiples of the dtype's epsilon. Two orders of summing some hundred terms differ by far less.
_TOLERANCE_IN_EPSILONS = 1024.0


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a rewritten model with zero queries is from its plain residual path.

    Attributes:
        sites: Number of AttnRes sites that ran.
        sum_difference: Largest difference of any output, relative to the output's largest value, with
            ``aggregation="sum"``: the sources then add up to exactly the plain stream.
        difference: The same with the model's own aggregation. With ``"mean"`` the stream is smaller by
            the number of sources, which only the epsilon of the norms that read it can notice.
        aggregation: The model's own aggregation.
        tolerance: What ``sum_difference`` may be, from the dtype of the outputs.
    """

    sites: int
    sum_difference: float
    difference: float
    aggregation: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the rewritten model computes, with zero queries, what the plain one does."""
        return self.sum_difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"verification {verdict}: {self.sites} sites, zero queries against plain residuals: relative "
            f'difference {self.sum_difference:.1e} with aggregation="sum" (tolerance {self.tolerance:.1e}), '
            f'{self.difference:.1e} with the model\'s own aggregation="{self.aggregation}"'
        )


class _VerifyingBackend(AttnResBackend):
    def __init__(self, aggregation: str | None) -> None:
        super().__init__("eager")
        self.aggregation = aggregation
        self.used = ""
        self.sites = 0

    def site_parameters(self, module: GraphModule, anchor: Anchor) -> list[SiteParameters]:
        # Not in the parameters themselves, with which other threads compute.
        build, zero = GraphBuilder(module), torch.ops.aten.zeros_like.default
        with module.graph.inserting_after(anchor.node):
            return [
                SiteParameters(build.call(zero, site.query, like=anchor.node), site.gain) for site in anchor.parameters
            ]

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        aggregation: Any = self.aggregation or config.aggregation
        self.used = aggregation
        return dataclasses.replace(config, aggregation=aggregation)

    def inserted(self, sites: list[Site]) -> None:
        self.sites += len(sites)


def verify(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Verification:
    """Compare the rewritten ``model``, with zeros in the place of its queries, with plain residuals.

    Both run on the weights, in the mode (train or eval) and with the random state that the model has
    now. The model itself is not changed: other threads may run it meanwhile.

    Args:
        model: A rewritten ``nn.Module``.
        example_inputs: As for :func:`attnres_rewrite.rewrite`.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
    """
    require_live(model, "verify")
    call = example_call(model, example_inputs)
    with torch.no_grad():
        with disabled(model):
            plain = _outputs(model, call, AttnResBackend("eager"))
        summing, own = _VerifyingBackend("sum"), _VerifyingBackend(None)
        summed = _outputs(model, call, summing)
        configured = _outputs(model, call, own)
    dtypes = [value.dtype for value in plain if value.is_floating_point()]
    tolerance = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) * _TOLERANCE_IN_EPSILONS
    return Verification(
        sites=summing.sites,
        sum_difference=relative_difference(summed, plain),
        difference=relative_difference(configured, plain),
        aggregation=own.used,
        tolerance=tolerance,
    )


def _outputs(model: nn.Module, call: Call, backend: AttnResBackend) -> list[Tensor]:
    with torch.random.fork_rng():
        return _compat.tensors_in(run_through(model, call.run, backend))


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
