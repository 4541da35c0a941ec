"""What the sites of a rewritten model have learned so far, as flat numbers that any logger takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from attnres_rewrite.capture.inputs import ExampleInputs
from attnres_rewrite.forms.live import require_live
from attnres_rewrite.forms.site_parameters import AttnResSite
from attnres_rewrite.inspection.depth import depth_attention


def log_dict(model: nn.Module, example_inputs: ExampleInputs | None = None) -> dict[str, float]:
    """Numbers that show how the Attention Residuals of ``model`` train, under names that stay the same.

    The totals fit one chart each. ``<site>`` is the owner's name and the number of the site, three digits, as in the
    names of its parameters: ``model.007`` for ``model.attn_res.7``, or ``007`` where the root is the owner. ``<read>``
    is the row of the site in :func:`attnres_rewrite.depth_attention` and the module that reads it.

    ==================================  ==========================================================================
    ``attnres/query_norm/<site>``       Euclidean norm of the pseudo-query; 0 at the start
    ``attnres/gain_drift/<site>``       RMS of the key gain minus one; 0 at the start
    ``attnres/weight_entropy/<read>``   entropy, in nats, of the mean depth weights; log n of n sources at the start
    ``attnres/largest_weight/<read>``   the largest of the mean depth weights; 1 / n at the start
    ``attnres/total/query_norm``        norm of all pseudo-queries together
    ``attnres/total/gain_drift``        RMS over all gains
    ``attnres/total/weight_entropy``    mean over the sites
    ``attnres/total/largest_weight``    mean over the sites
    ==================================  ==========================================================================

    Norms are taken in float32 or wider. Of sharded parameters (DTensor) they are those of the whole, so that every
    process has to make the call.

    Args:
        model: A rewritten ``nn.Module``. It is not changed.
        example_inputs: A small batch for the depth weights, as for :func:`attnres_rewrite.depth_attention`; the model
            runs once on it. Without it nothing runs, and there are no depth weights.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
        GraphBreakError: No AttnRes site ran on these inputs.
        ExampleInputsError: The example inputs are of the wrong kind.
    """
    values = _of_parameters(list(named_sites(model, "log_dict")))
    if example_inputs is not None:
        values |= _of_depth_weights(model, example_inputs)
    # The totals first, for whoever prints them.
    return dict(sorted(values.items(), key=lambda item: not item[0].startswith("attnres/total/")))


def named_sites(model: nn.Module, verb: str) -> Iterator[tuple[str, int, AttnResSite]]:
    """The owner, the number and the parameters of every site of ``model``; raises for ``verb`` if there is none."""
    for owner, live in require_live(model, verb):
        for i, site in enumerate(live.sites):
            yield owner, i, site


def _of_parameters(sites: list[tuple[str, int, AttnResSite]]) -> dict[str, float]:
    by_name = {f"{owner}.{i:03d}".lstrip("."): site for owner, i, site in sites}
    squares = _sums_of_squares({name: site.query for name, site in by_name.items()}, 0.0)
    values = {f"attnres/query_norm/{name}": math.sqrt(square) for name, square in squares.items()}
    values["attnres/total/query_norm"] = math.sqrt(sum(squares.values()))
    gains = {name: site.gain for name, site in by_name.items() if site.gain is not None}
    if gains:
        squares = _sums_of_squares(gains, 1.0)
        values |= {f"attnres/gain_drift/{n}": math.sqrt(square / gains[n].numel()) for n, square in squares.items()}
        values["attnres/total/gain_drift"] = math.sqrt(sum(squares.values()) / sum(g.numel() for g in gains.values()))
    return values


@torch.no_grad()
def _sums_of_squares(parameters: Mapping[str, Tensor], origin: float) -> dict[str, float]:
    """For every parameter the sum of the squares of its differences from ``origin``."""
    sums = [(p.to(torch.promote_types(p.dtype, torch.float32)) - origin).square().sum() for p in parameters.values()]
    # Of a DTensor the whole, without importing what defines it.
    whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in sums]
    # One transfer from the device for all of them.
    together = torch.stack([value.to(whole[0].device) for value in whole])
    return dict(zip(parameters, together.tolist(), strict=True))


def _of_depth_weights(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, float]:
    depth = depth_attention(model, example_inputs)
    weights = depth.weights.nan_to_num(0.0)
    entropies, largest = torch.special.entr(weights).sum(1), weights.amax(1)
    values = {}
    for row, reader in enumerate(depth.sites):
        label = f"{row:03d}.{reader.replace(' ', '_')}"
        values[f"attnres/weight_entropy/{label}"] = entropies[row].item()
        values[f"attnres/largest_weight/{label}"] = largest[row].item()
    values["attnres/total/weight_entropy"] = entropies.mean().item()
    values["attnres/total/largest_weight"] = largest.mean().item()
    return values


def decayed_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the queries and gains of ``model`` that ``optimizer`` decays."""
    groups = [group for group in optimizer.param_groups if group.get("weight_decay")]
    decayed = {id(parameter) for group in groups for parameter in group["params"]}
    return [
        f"{owner}.attn_res.{i}.{name}".lstrip(".")
        for owner, i, site in named_sites(model, "decayed_parameters")
        for name, parameter in site.named_parameters()
        if id(parameter) in decayed
    ]
