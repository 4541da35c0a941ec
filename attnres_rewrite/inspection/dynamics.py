"""Output magnitudes and gradient norms by depth of a plain or a rewritten model (paper, section on training dynamics).

The model's graph is interpreted, as for :mod:`depth`: layers of a rewritten model run nowhere else, and a graph says
what is on the stream, whatever the modules give each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.capture.dynamo import capture
from attnres_rewrite.capture.inputs import (
    Call,
    ExampleInputs,
    as_it_was,
    compiled,
    example_call,
    uncompiled,
    without_traces,
)
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import ExampleInputsError, GraphBreakError, MissingPackageError, NoResidualStreamError
from attnres_rewrite.forms.live import live_forwards, run_through
from attnres_rewrite.forms.output_hooks import make_hooks_traceable
from attnres_rewrite.inspection.sublayers import Recording, RecordingBackend
from attnres_rewrite.pipeline import analyse


@dataclasses.dataclass(frozen=True)
class TrainingDynamics:
    """What the sublayers of one model put out and which gradients they get, in the order in which they run.

    An RMS is taken over all elements of a tensor ``[B, T, D]``, padding included, in float32 or wider.

    Attributes:
        rewritten: Whether Attention Residuals ran.
        sublayers: For every branch output f_k, the module that computes it; the layer, where it is of several.
        branch_rms: RMS of f_k.
        output_rms: RMS of the running sum after f_k: of the stream itself in a plain model, and of the block in
            progress, which begins anew after every block, in a rewritten one.
        read_rms: RMS of what the next sublayer, or the last norm, reads: again the stream in a plain model, and what
            the site computes in a rewritten one.
        gradient_norm: Euclidean norm of the gradient of the loss by all parameters, together, that f_k computes with,
            its norm among them, the queries and gains of sites not. NaN where none of them requires gradients. A module
            that several sublayers run counts in each, with its whole gradient; what is computed once for several, as
            from an encoder's last norm, in none.
        loss: The loss.
    """

    rewritten: bool
    sublayers: list[str]
    branch_rms: list[float]
    output_rms: list[float]
    read_rms: list[float]
    gradient_norm: list[float]
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON; ``None`` in the place of NaN."""
        fields = dataclasses.asdict(self)
        return {
            name: [None if one != one else one for one in value] if isinstance(value, list) else value
            for name, value in fields.items()
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fields to a JSON file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)

    def plot(self, path: str | PathLike[str], other: TrainingDynamics | None = None) -> None:
        """Draw output magnitude and gradient norm by depth to an image file, side by side.

        Args:
            path: The file.
            other: Another model's, for comparison in the same two charts.

        Raises:
            MissingPackageError: matplotlib is not installed (extra ``plot``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError("plotting", "matplotlib", "plot") from error
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        charts = {"output_rms": "RMS of the running sum", "gradient_norm": "gradient norm of the parameters"}
        for axes, (field, label) in zip(figure.subplots(1, 2), charts.items(), strict=True):
            for one in (other, self):
                if one is not None:
                    depth = range(1, len(one.sublayers) + 1)
                    name = "AttnRes" if one.rewritten else "plain"
                    colour = "tab:blue" if one.rewritten else "tab:gray"
                    style = "--" if one is other and other.rewritten == self.rewritten else "-"
                    axes.plot(depth, getattr(one, field), f"o{style}", color=colour, markersize=3, label=name)
            axes.set(xlabel="sublayer", ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=120)


def training_dynamics(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    config: AttnResConfig | None = None,
) -> TrainingDynamics:
    """Run ``model`` once, forward and backward, and record output magnitudes and gradient norms by depth.

    Works on plain and rewritten models alike, and on a rewritten one within :func:`attnres_rewrite.disabled`::

        plain = training_dynamics(model, batch)
        rewrite(model, blocks=4)
        ...  # train
        training_dynamics(model, batch).plot("dynamics.png", other=plain)

    The model runs in the mode that it is in, and is left as it was: weights, gradients, buffers, random state.

    Args:
        model: The model.
        example_inputs: A batch, as for :func:`attnres_rewrite.rewrite`.
        loss: Makes a scalar loss of what the model returns. Left out, the model returns it, alone or as ``loss``, as
            those of Hugging Face do that are given ``labels``.
        config: For a plain model of which not all can be rewritten: the same as for :func:`attnres_rewrite.rewrite`.

    Raises:
        ExampleInputsError: The example inputs do not fit, or there is no loss that gradients can be taken of.
        NoResidualStreamError: The model has no residual stream.
        UnsupportedResidualError: The residuals of a plain model are of a kind that cannot be rewritten.
        GraphBreakError: A graph break lies between the layers.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"training_dynamics takes an nn.Module, plain or rewritten, not {type(model).__name__}")
    call = example_call(model, example_inputs)
    # Closed, because Dynamo holds on to the backend, and so to what is recorded.
    with (
        contextlib.closing(Recording(model)) as recorded,
        as_it_was(model),
        without_traces(model),
        torch.enable_grad(),
    ):
        make_hooks_traceable(model)
        live = next(live_forwards(model), None)
        if live is None:
            output = _run_plain(model, call, recorded, config or AttnResConfig())
        else:
            backend = RecordingBackend(recorded, plain_streams=live[1].state.backend.plain_streams)
            output = run_through(model, call.run, backend)
        if not recorded.sublayers:
            raise NoResidualStreamError("training_dynamics: no residual stream ran on these inputs")
        value = _scalar(output, loss)
        norms = recorded.gradient_norms(value)
        return TrainingDynamics(
            rewritten=any(one.has_site for one in recorded.sublayers),
            sublayers=[one.name for one in recorded.sublayers],
            branch_rms=[one.branch_rms for one in recorded.sublayers],
            output_rms=[one.output_rms for one in recorded.sublayers],
            read_rms=[one.read_rms for one in recorded.sublayers],
            gradient_norm=norms,
            loss=value.item(),
        )


def _run_plain(model: nn.Module, call: Call, recorded: Recording, config: AttnResConfig) -> Any:
    """Run a model that is not rewritten, whose streams must be such as can be."""
    with uncompiled(model):
        captured = capture(model, call, config.streams)
        one_block = dataclasses.replace(config, blocks=1, layers_per_block=None, sublayers_per_block=None)
        plans = analyse(captured.modules, one_block).plans
        backend = RecordingBackend(recorded, plain_streams=("*",), owners={plan.stream.owner for plan in plans})
        output = call.run(compiled(model, backend, scalars=captured.scalars))
    expected = sum(1 for plan in plans for branch in plan.stream.branches if branch.adds)
    if len(recorded.sublayers) != expected:
        raise GraphBreakError(
            f"training_dynamics: {expected} sublayers of this {type(model).__name__} are on residual streams, but "
            f"{len(recorded.sublayers)} were seen to run: a graph break lies between them"
        )
    return output


def _scalar(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    found = loss(output) if loss is not None else getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        kind = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        where = f"loss= returns {kind}" if loss is not None else f"the model returns {kind}, and no loss"
        raise ExampleInputsError(
            f"training_dynamics needs one number to take gradients of, and {where}: give the model its labels in "
            "example_inputs, or pass loss= a function that makes a scalar tensor of what the model returns"
        )
    if not found.requires_grad:
        raise ExampleInputsError(
            "training_dynamics: the loss does not depend on a parameter that requires gradients: is the model frozen, "
            "or its output detached?"
        )
    return found.reshape(())
