"""What the demo leaves behind: the table, the loss curves and the numbers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one of the two models came to.

    Attributes:
        parameters: Number of parameters.
        losses: Training loss of every step, in nats a byte.
        validation: Steps taken and validation loss then, in nats a byte.
        step_seconds: Median wall time of a training step.
        tokens_per_second: Trained bytes a second.
    """

    parameters: int
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    step_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        plain: The model with plain residuals.
        rewritten: The same model with Block Attention Residuals.
        onnx_difference: Largest relative difference between ONNX Runtime and PyTorch.
        device: Where the models were trained.
        settings: Settings of the demo.
    """

    plain: RunResult
    rewritten: RunResult
    onnx_difference: float
    device: str
    settings: dict[str, Any]

    @property
    def step_time_ratio(self) -> float:
        """Median step time of the rewritten model over that of the plain one."""
        return self.rewritten.step_seconds / self.plain.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {**dataclasses.asdict(self), "step_time_ratio": self.step_time_ratio}

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """The table that the demo ends with."""
        from rich.table import Table

        table = Table(title=f"{len(self.plain.losses)} steps on {self.device}")
        for name in ("", "plain", "AttnRes"):
            table.add_column(name, justify="right" if name else "left")
        both = (self.plain, self.rewritten)
        table.add_row("final validation loss (nats/byte)", *(f"{run.validation[-1][1]:.4f}" for run in both))
        table.add_row("training tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in both))
        table.add_row("parameters", *(f"{run.parameters:,}" for run in both))
        table.add_row("step time, ratio to plain", "1.000", f"{self.step_time_ratio:.3f}")
        table.add_row("ONNX Runtime, largest relative difference", "", f"{self.onnx_difference:.1e}")
        return table


def plot_losses(result: DemoResult, path: Path) -> None:
    """Draw the training and validation losses of both models to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, run, colour in (("plain", result.plain, "tab:gray"), ("AttnRes", result.rewritten, "tab:blue")):
        axes.plot(smooth(run.losses), color=colour, alpha=0.4, linewidth=1, label=f"{name}, training (smoothed)")
        axes.plot(*zip(*run.validation, strict=True), "o-", color=colour, markersize=3, label=f"{name}, validation")
    axes.set(xlabel="step", ylabel="loss (nats/byte)", title="Python standard library, byte level")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def smooth(losses: Sequence[float], window: int = 10) -> list[float]:
    """Mean of each value and the ``window - 1`` before it."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
