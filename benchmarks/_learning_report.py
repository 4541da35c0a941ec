"""What the runs of `benchmarks/learning.py` say together."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import mpmath

Found = Mapping[str, Any]


def summary(runs: Sequence[Found]) -> dict[str, Any]:
    """For every contestant of one size: its rates, its losses over the seeds, and what it needs to reach the plain one.

    Returns:
        By contestant: ``rates``, validation loss of the first seed by learning rate, None where it diverged; ``rate``,
        the best; ``seeds``, how many ran at it; ``validation`` and ``test``, mean and standard deviation over them, in
        nats a byte; ``curve``, tokens and mean validation loss; ``looks`` of the first that has any. Beside the plain
        model, seed by seed: ``difference``, mean and standard deviation of the test loss minus the plain model's;
        ``p``, how often seeds that make no difference would give one as large in either direction (a paired t-test),
        None where there are no two seeds or they all differ alike; ``tokens_to_plain``, which part of the tokens the
        validation loss took to fall to the plain model's last, a seed each, None where it did not.
    """
    names = list(dict.fromkeys(_name(run) for run in runs))
    rates = {name: _rates([run for run in runs if _name(run) == name]) for name in names}
    best = {name: min(of_one, key=of_one.__getitem__) for name, of_one in rates.items()}
    at_best = {
        name: {
            run["run"]["seed"]: run
            for run in runs
            if (_name(run), run["run"]["rate"]) == (name, best[name]) and run["validation"] is not None
        }
        for name in names
    }
    plain = at_best.get("plain", {})
    return {
        name: {
            "rates": {f"{rate:g}": None if math.isinf(loss) else loss for rate, loss in sorted(rates[name].items())},
            "rate": best[name],
            **_of_seeds(at_best[name]),
            **_beside(plain, at_best[name]),
        }
        for name in names
    }


def _name(run: Found) -> str:
    """The contestant, and the learning rate of its sites where that is another."""
    times = run["run"].get("attnres_rate", 1.0)
    return str(run["run"]["contestant"]) + ("" if times == 1.0 else f", sites at {times:g}x")


def _rates(runs: Sequence[Found]) -> dict[float, float]:
    """The validation loss of the first seed by learning rate."""
    first = [run for run in runs if run["run"]["seed"] == 0]
    return {r["run"]["rate"]: math.inf if r["validation"] is None else r["validation"] for r in first}


def _of_seeds(runs: Mapping[int, Found]) -> dict[str, Any]:
    of_runs = list(runs.values())
    return {
        "parameters": of_runs[0]["parameters"] if of_runs else None,
        "seeds": len(runs),
        "validation": _spread([run["validation"] for run in of_runs]),
        "test": _spread([run["test"] for run in of_runs]),
        "curve": [
            [points[0][0], round(statistics.fmean(loss for _, loss in points), 5)]
            for points in zip(*(run["curve"] for run in of_runs), strict=False)
        ],
        "looks": next((run["looks"] for run in of_runs if run["looks"]), []),
    }


def _beside(plain: Mapping[int, Found], runs: Mapping[int, Found]) -> dict[str, Any]:
    both = sorted(plain.keys() & runs.keys())
    differences = [runs[seed]["test"] - plain[seed]["test"] for seed in both]
    return {
        "difference": _spread(differences),
        "p": _paired_t_test(differences),
        "tokens_to_plain": [_part_to_reach(runs[seed], plain[seed]["validation"]) for seed in both],
    }


def _spread(values: Sequence[float]) -> list[float | None]:
    """Mean and standard deviation, the latter None of a single value."""
    if not values:
        return [None, None]
    deviation = round(statistics.stdev(values), 5) if len(values) > 1 else None
    return [round(statistics.fmean(values), 5), deviation]


def _paired_t_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of a mean of zero, by Student's distribution (Abramowitz and Stegun, 26.5.27)."""
    if len(differences) < 2 or (deviation := statistics.stdev(differences)) == 0:
        return None
    free = len(differences) - 1
    t = statistics.fmean(differences) / deviation * math.sqrt(len(differences))
    return round(float(mpmath.betainc(free / 2, 0.5, 0, free / (free + t * t), regularized=True)), 4)


def _part_to_reach(run: Found, loss: float) -> float | None:
    """Which part of the tokens of ``run`` its validation loss took to fall to ``loss``, linear between two values."""
    curve = run["curve"]
    for (before, above), (after, below) in itertools.pairwise(curve):
        if below <= loss:
            part = 1.0 if above == below else min(1.0, (above - loss) / (above - below))
            return round((before + max(0.0, part) * (after - before)) / curve[-1][0], 4)
    return None


def tables(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries of all sizes as Markdown."""
    lines = []
    for size, contestants in summaries.items():
        lines += [
            f"**{size}**",
            "",
            "| | best rate | seeds | test loss | against plain | p | tokens to plain's loss |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, entry in contestants.items():
            p = "–" if entry["p"] is None else f"{entry['p']:.3f}"
            lines.append(
                f"| {name} | {entry['rate']:g} | {entry['seeds']} | {_text(entry['test'])} | "
                f"{_text(entry['difference'], '+')} | {p} | {_parts(entry['tokens_to_plain'])} |"
            )
        lines.append("")
    return "\n".join(lines)


def inside_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Depth weights of the trained models as Markdown: means over the reads, at the last look."""
    lines = ["| | | largest weight | entropy, nats | norm of the queries |", "|---|---|---|---|---|"]
    for size, contestants in summaries.items():
        for name, entry in contestants.items():
            last = entry["looks"][-1] if entry["looks"] else {}
            if "largest_weight" in last:
                means = (statistics.fmean(last[key]) for key in ("largest_weight", "weight_entropy", "query_norm"))
                lines.append(f"| {size} | {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join([*lines, ""])


def _text(spread: Sequence[float | None], sign: str = "") -> str:
    mean, deviation = spread
    if mean is None:
        return "–"
    return f"{mean:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _parts(parts: Sequence[float | None]) -> str:
    return ", ".join("never" if part is None else f"{100 * part:.0f}%" for part in parts) or "–"
