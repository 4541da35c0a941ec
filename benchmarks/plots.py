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
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
# What is looked at inside of a model, and how an axis says it.
INSIDE = {
    "output_rms": "RMS of the running sum after it",
    "gradient_norm": "norm of the gradient",
    "largest_weight": "largest depth weight",
}


def read(name: str) -> Any:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def draw_sizes() -> None:
    """Training and inference against the plain model: medians, and the 10th and 90th percentile, of every size."""
    sizes = read("end_to_end")["sizes"]
    figure, axes = plt.subplots(figsize=(8, 6.5), layout="constrained")
    for offset, (kind, claim) in zip((0.15, -0.15), (("training", 4), ("inference", 2)), strict=True):
        timed = [(i - offset, size["times"][kind]) for i, size in enumerate(sizes) if kind in size["times"]]
        added, low, high = ([100 * (t[key] - 1) for _, t in timed] for key in ("ratio", "ratio_p10", "ratio_p90"))
        ranges = [[m - a for m, a in zip(added, low, strict=True)], [z - m for m, z in zip(added, high, strict=True)]]
        points = axes.errorbar(added, [y for y, _ in timed], xerr=ranges, fmt="o", label=kind, elinewidth=0.8)
        color = points.lines[0].get_color()
        axes.axvline(claim, color=color, linewidth=0.8, linestyle="--", label=f"the paper's claim for {kind}")
    labels = ["{layers} layers, D {width}, {batch} x {length}, {blocks} blocks".format(**size) for size in sizes]
    axes.set_yticks(range(len(sizes)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("added to the time of a step, %")
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(IMAGES / "end_to_end.png", dpi=120)


def draw_schedules() -> None:
    """Two phases against read by read, over the number of rows; a line for every shape."""
    lines: dict[tuple[int, int], list[Any]] = {}
    for result in sorted(read("schedule")["results"], key=lambda r: (r["blocks"], r["reads"], r["rows"])):
        lines.setdefault((result["blocks"], result["reads"]), []).append(result)
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.5), sharey=True, layout="constrained")
    for axes, step in zip(panels, ("forward", "forward+backward"), strict=True):
        for (blocks, reads), results in lines.items():
            ratios = [result[step]["ratio"] for result in results]
            axes.plot([r["rows"] for r in results], ratios, "o-", label=f"{blocks} blocks, {reads} reads", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("rows")
        axes.set_title(step, fontsize=9)
        axes.axhline(1, color="0.4", linewidth=0.8)
    panels[0].set_ylabel("time of two phases / read by read")
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / "schedule.png", dpi=120)


def draw_learning(study: str) -> None:
    """Models trained from scratch: the loss at every rate; on the way, below plain's; at the end, with all seeds."""
    sizes = {name: found for name, found in read(f"{study}/summary").items() if "retrofit" not in name}
    figure, rows = plt.subplots(len(sizes), 3, figsize=(11, 3.6 * len(sizes)), layout="constrained", squeeze=False)
    for (rates, way, end), (size, contestants) in zip(rows, sizes.items(), strict=True):
        plain = dict(contestants["plain"]["curve"])
        for name, found in contestants.items():
            tried = [(float(rate), loss) for rate, loss in found["rates"].items() if loss is not None]
            rates.plot(*zip(*tried, strict=True), marker="o", markersize=3, linewidth=1, **style(name, contestants))
            tokens, losses = zip(*found["curve"], strict=True)
            below = [loss - plain[token] for token, loss in zip(tokens, losses, strict=True)]
            way.plot([token / 1e6 for token in tokens], below, linewidth=1, label=name, **style(name, contestants))
        ticks = sorted({float(rate) for found in contestants.values() for rate in found["rates"]})
        rates.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a byte, first seed", title=size)
        rates.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        rates.minorticks_off()
        way.set(xlabel="million bytes trained on", ylabel="validation loss minus plain's, at the best rates")
        way.legend(frameon=False, fontsize=7, ncols=2)
        draw_differences(end, contestants)
    figure.savefig(IMAGES / f"{study}.png", dpi=120)


def style(name: str, contestants: Any) -> dict[str, str]:
    """Of a line: grey for plain, dashed with a gate."""
    color = "0.2" if name == "plain" else f"C{list(contestants).index(name) % 10}"
    return {"color": color, "linestyle": "--" if "gate" in name else "-"}


def draw_differences(axes: Any, contestants: Any) -> None:
    """Test loss minus that of the plain model, seed by seed: mean, and standard deviation over the seeds."""
    names = sorted((n for n in contestants if n != "plain"), key=lambda n: contestants[n]["difference"][0] or 0.0)
    for y, name in enumerate(names):
        mean, deviation = contestants[name]["difference"]
        if mean is not None:
            axes.errorbar(mean, y, xerr=deviation, fmt="o", color="C0" if mean < 0 else "C3", elinewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="test loss minus plain's, nats a byte")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def draw_retrofit(study: str) -> None:
    """A trained plain model that goes on, in every form; the scale is linear up to a hundredth."""
    found = {name: entry for name, entry in read(f"{study}/summary").items() if "retrofit" in name}
    height = max(map(len, found.values())) / 4
    figure, panels = plt.subplots(1, len(found), figsize=(8 * len(found), height), layout="constrained", squeeze=False)
    for axes, (size, contestants) in zip(panels[0], found.items(), strict=True):
        draw_differences(axes, contestants)
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xticks(ticks := [-0.01, -0.005, 0, 0.005, 0.01, 0.1, 0.2], [f"{tick:g}" for tick in ticks])
        axes.set_title(size)
    figure.savefig(IMAGES / f"{study.replace('learning', 'retrofit')}.png", dpi=120)


def draw_inside() -> None:
    """Magnitudes and gradients by depth after training from scratch, and how far the reads are from uniform."""
    contestants = {name: found for name, found in read("learning/summary")["0.4M"].items() if found["looks"]}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axes, (key, label) in zip(panels, INSIDE.items(), strict=True):
        for name, found in contestants.items():
            if values := found["looks"][-1].get(key):
                axes.plot(values, marker="o", markersize=2, linewidth=1, label=name, **style(name, contestants))
        axes.set(xlabel="sublayer" if key != "largest_weight" else "read", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(IMAGES / "inside.png", dpi=120)


def draw_training() -> None:
    """Inside of models while they train, a row a contestant: darker is later."""
    size = "0.1M"
    contestants = read("learning_cpu/summary")[size]
    shown = [name for name in ("plain", "mean-8", "sum-8", "add-8") if contestants[name]["looks"]]
    figure, rows = plt.subplots(
        len(shown), 3, figsize=(11, 2.4 * len(shown)), layout="constrained", sharex="col", sharey="col"
    )
    for panels, name in zip(rows, shown, strict=True):
        looks = contestants[name]["looks"]
        for axes, (key, label) in zip(panels, INSIDE.items(), strict=True):
            for i, look in enumerate(looks):
                if values := look.get(key):
                    axes.plot(values, linewidth=1, color=plt.cm.viridis_r(i / len(looks)), label=f"{look['part']:.0%}")
            axes.set_ylabel(label, fontsize=7)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            # A plain model has no depth weights.
            axes.set_visible(bool(axes.lines))
        panels[0].set_title(f"{name}, {size}", fontsize=8)
    for axes, label in zip(rows[-1], ("sublayer", "sublayer", "read"), strict=True):
        axes.set_xlabel(label)
    rows[0][0].legend(frameon=False, fontsize=6, title="of the training", title_fontsize=6)
    figure.savefig(IMAGES / "training.png", dpi=120)


if __name__ == "__main__":
    draw_sizes()
    draw_schedules()
    for study in ("learning", "learning_cpu"):
        draw_learning(study)
        draw_retrofit(study)
    draw_inside()
    draw_training()
