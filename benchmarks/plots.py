"""Draw what the other scripts measured: from ``results/*.json`` to ``docs/images/``.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"


def read(name: str) -> Any:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def draw_sizes() -> None:
    """Training and inference against the plain model, one bar a size."""
    sizes = [size for size in read("end_to_end")["sizes"] if {"training", "inference"} <= size["times"].keys()]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, kind in ((-0.2, "training"), (0.2, "inference")):
        ratios = [size["times"][kind]["ratio"] for size in sizes]
        axes.bar([i + offset for i in range(len(sizes))], [100 * (ratio - 1) for ratio in ratios], 0.4, label=kind)
    labels = ["{layers} layers\nD {width}\nT {length}".format(**size) for size in sizes]
    axes.set_xticks(range(len(sizes)), labels, fontsize=7)
    axes.set_ylabel("added to the time of a step, %")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "end_to_end.png", dpi=120)


def draw_schedules() -> None:
    """Two phases against read by read, one group of bars a shape."""
    results = read("schedule")["results"]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for offset, step in ((-0.2, "forward"), (0.2, "forward+backward")):
        axes.bar([i + offset for i in range(len(results))], [r[step]["ratio"] for r in results], 0.4, label=step)
    labels = ["{blocks} blocks\n{reads} reads\n{rows} rows".format(**result) for result in results]
    axes.set_xticks(range(len(results)), labels, fontsize=7)
    axes.set_ylabel("time of two phases / read by read")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "schedule.png", dpi=120)


if __name__ == "__main__":
    draw_sizes()
    draw_schedules()
