"""What was measured: the figures, the table, the JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import attnres_rewrite
from attnres_rewrite.bench.settings import BenchSettings, Form, Kind

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of every timed step of both forms; the i-th of each are of one round.

    Attributes:
        plain: Of the plain form.
        rewritten: Of the rewritten form.
        recompiled: Graphs that were compiled during the timed rounds. If there are any, the times are not those of
            the step.
    """

    plain: tuple[float, ...]
    rewritten: tuple[float, ...]
    recompiled: int = 0

    @property
    def plain_ms(self) -> float:
        """Median step time of the plain form, in milliseconds."""
        return statistics.median(self.plain) * 1e3

    @property
    def rewritten_ms(self) -> float:
        """Median step time of the rewritten form, in milliseconds."""
        return statistics.median(self.rewritten) * 1e3

    @property
    def ratios(self) -> tuple[float, ...]:
        """Rewritten over plain, of every round."""
        return tuple(r / p for r, p in zip(self.rewritten, self.plain, strict=True))

    @property
    def ratio(self) -> float:
        """Median of the ratios of the rounds."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile of the ratios of the rounds."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        deciles = statistics.quantiles(self.ratios, n=10, method="inclusive")
        return deciles[0], deciles[-1]

    def to_dict(self) -> dict[str, float | int]:
        """The figures that stand for all rounds, for JSON."""
        low, high = self.spread
        return {
            "plain_ms": self.plain_ms,
            "rewritten_ms": self.rewritten_ms,
            "ratio": self.ratio,
            "ratio_p10": low,
            "ratio_p90": high,
            "ratio_of_medians": self.rewritten_ms / self.plain_ms,
            "rounds": len(self.ratios),
            "recompiled": self.recompiled,
        }


@dataclasses.dataclass(frozen=True)
class Alone:
    """What one form costs in a process of its own, for one kind of step.

    Attributes:
        compile_s: Seconds of the first step with a cold cache, less those of a later one.
        passes_s: Seconds of them that the passes of this package took.
        before_mb: Memory in use before a step, after some others, in MiB: weights, state of the optimizer, and on a
            CPU the program itself. ``None`` where it cannot be measured.
        peak_mb: The most memory that a step has in use beyond that, in MiB, or ``None``.
    """

    compile_s: float
    passes_s: float
    before_mb: float | None
    peak_mb: float | None


@dataclasses.dataclass(frozen=True)
class FormAlone:
    """What one form costs in a process of its own.

    Attributes:
        rewrite_s: Seconds of :func:`attnres_rewrite.rewrite`; zero for the plain form.
        kinds: Training and inference steps; compiled in this order, in one process.
    """

    rewrite_s: float
    kinds: dict[Kind, Alone]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> FormAlone:
        """The figures that ``dataclasses.asdict`` made plain data of."""
        return cls(fields["rewrite_s"], {kind: Alone(**figures) for kind, figures in fields["kinds"].items()})


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """A comparison of a model with its rewritten form.

    Attributes:
        model: Name of the model's class.
        parameters: Number of parameters of both forms.
        sizes: Sizes of the inputs, by the name or the position of the argument.
        cached: Tokens in the cache of a decode step, where there were any.
        device: Where it ran.
        settings: What was asked for.
        times: Step times.
        skipped: For a kind of step that was wanted and could not be, why.
        environment: Versions and hardware.
        alone: Compile times and memory, if they were measured.
        blocks: Number of blocks of every stream.
    """

    model: str
    parameters: dict[Form, int]
    sizes: dict[str, list[int]]
    cached: int | None
    device: str
    settings: BenchSettings
    times: dict[Kind, StepTimes]
    skipped: dict[Kind, str]
    environment: dict[str, Any]
    alone: dict[Form, FormAlone] | None = None
    blocks: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON; of the times, what stands for all rounds."""
        return {**dataclasses.asdict(self), "times": {kind: times.to_dict() for kind, times in self.times.items()}}

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def title(self) -> str:
        """The model, its inputs and where it ran, in a line."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        per_block = self.settings.layers_per_block
        blocks = " and ".join(map(str, self.blocks)) if self.settings.blocks == "auto" else self.settings.blocks
        grouped = f"{blocks} blocks" if per_block is None else f"blocks of {per_block} layers"
        return f"{self.model}, {sizes}, {grouped}, on {self.device}"

    def table(self) -> Table:
        """Both forms side by side; below one is better for the rewritten form."""
        from rich.table import Table

        table = Table(title=self.title())
        for name in ("", "plain", "AttnRes", "ratio", "10% to 90%"):
            table.add_column(name, justify="right" if name else "left")
        for kind, times in self.times.items():
            name = f"decode ({self.cached} cached)" if kind == "decode" else kind
            low, high = times.spread
            figures = (f"{times.plain_ms:.2f}", f"{times.rewritten_ms:.2f}", f"{times.ratio:.3f}")
            table.add_row(f"{name}: step (ms)", *figures, f"{low:.3f} to {high:.3f}")
        for row in self._rows_alone():
            table.add_row(*row)
        plain, rewritten = self.parameters["plain"], self.parameters["rewritten"]
        table.add_row("parameters", f"{plain:,}", f"{rewritten:,}", f"{rewritten / plain:.3f}")
        return table

    def _rows_alone(self) -> list[tuple[str, ...]]:
        if self.alone is None:
            return []
        plain, rewritten = self.alone["plain"], self.alone["rewritten"]
        rows = []
        for kind in plain.kinds:
            one, other = plain.kinds[kind], rewritten.kinds[kind]
            rows.append(_row(f"{kind}: compile, cold (s)", one.compile_s, other.compile_s))
            share = f"{other.passes_s / other.compile_s:.2%}" if other.compile_s > 0 else ""
            rows.append((f"{kind}: share of our passes", "", share))
            rows.append(_row(f"{kind}: peak memory (MiB)", one.peak_mb, other.peak_mb))
        rows.append(("rewrite() (s)", "", f"{rewritten.rewrite_s:.1f}"))
        return rows

    def notes(self) -> list[str]:
        """What to know of the figures: the steps that were left out, and times that are not to be relied on."""
        notes = [f"no {kind} steps: {reason}" for kind, reason in self.skipped.items()]
        return notes + [
            f"{kind} steps: {times.recompiled} graphs were compiled while they were timed; give more warm-up rounds"
            for kind, times in self.times.items()
            if times.recompiled
        ]


def _row(name: str, plain: float | None, rewritten: float | None) -> tuple[str, ...]:
    if plain is None or rewritten is None:
        return (name, "", "")
    return (name, f"{plain:.1f}", f"{rewritten:.1f}", f"{rewritten / plain:.3f}" if plain > 0 else "")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that figures depend on; nothing that names the machine."""
    found: dict[str, Any] = {
        "attnres_rewrite": attnres_rewrite.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
