"""Loss against compute over the sizes of `benchmarks/learning.py`: a power law for every contestant."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

from _learning import SIZES, VOCABULARY

# Two points lie on a power law always.
FEWEST = 3
PETA = 1e15

Summaries = Mapping[str, Mapping[str, Mapping[str, Any]]]


def compute_of(size: str, parameters: int) -> float:
    """Operations of a training run: six a token and parameter of a matrix, and those of attention.

    (Appendix B of arXiv:2204.02311.) The embedding is looked up, not multiplied. What the residual connection computes
    by itself is not counted.
    """
    shape = SIZES[size]
    attention = 12 * shape.layers * shape.width * shape.length
    return shape.tokens * (6.0 * (parameters - VOCABULARY * shape.width) + attention)


def scaling(summaries: Summaries) -> dict[str, dict[str, Any]]:
    """Fit ``test loss = factor * compute ** -exponent``, as the paper does (section 5.1), compute in 1e15 operations.

    Args:
        summaries: By size, those of ``_learning_report.summary``; stages that are no size are left alone.

    Returns:
        By contestant that has a loss in three sizes which the plain model has too: ``sizes``, the smallest first;
        ``factor`` and ``exponent``; ``off``, the largest deviation of a size from the law, as a part of its loss;
        ``exponents``, those from each size to the next, of which a law has one;
        ``exponent_of_plain`` over the same sizes; ``plain_needs``, how many times its compute at the largest size the
        plain model would need for the same loss, by the two laws.
    """
    points = {name: _points(summaries, name) for contestants in summaries.values() for name in contestants}
    found = {}
    for name, mine in points.items():
        sizes = sorted(mine.keys() & points.get("plain", {}).keys(), key=lambda size: mine[size][0])
        if len(sizes) < FEWEST:
            continue
        law, plain = (_fit({size: of[size] for size in sizes}) for of in (mine, points["plain"]))
        largest = mine[sizes[-1]][0]
        loss = law["factor"] * largest ** -law["exponent"]
        needed = (plain["factor"] / loss) ** (1 / plain["exponent"]) if plain["exponent"] > 0 else math.inf
        found[name] = {
            "sizes": sizes,
            **{key: float(f"{value:.5g}") for key, value in law.items()},
            "exponents": [
                float(f"{_fit({size: mine[size] for size in pair})['exponent']:.4g}")
                for pair in itertools.pairwise(sizes)
            ],
            "exponent_of_plain": float(f"{plain['exponent']:.5g}"),
            "plain_needs": round(needed / largest, 4) if math.isfinite(needed) else None,
        }
    return found


def _points(summaries: Summaries, name: str) -> dict[str, tuple[float, float]]:
    """Compute and test loss by size."""
    found = {}
    for size in summaries.keys() & SIZES.keys():
        entry = summaries[size].get(name)
        if entry is not None and entry["test"][0] is not None:
            found[size] = compute_of(size, entry["parameters"]) / PETA, entry["test"][0]
    return found


def _fit(points: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Least squares of the logarithms."""
    logs = [(math.log(compute), math.log(loss)) for compute, loss in points.values()]
    line = statistics.linear_regression(*zip(*logs, strict=True))
    off = max(abs(math.expm1(loss - line.intercept - line.slope * compute)) for compute, loss in logs)
    return {"factor": math.exp(line.intercept), "exponent": -line.slope, "off": off}


def scaling_text(summaries: Summaries, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The laws as Markdown, or why there are none."""
    sizes = [size for size in SIZES if size in summaries]
    if not found:
        return f"Loss against compute: runs of {', '.join(sizes) or 'no size'}. An exponent takes {FEWEST} sizes.\n"
    lines = [
        "| | sizes | exponent | of plain | from size to size | largest deviation | compute that plain needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, law in found.items():
        needs = "–" if law["plain_needs"] is None else f"{law['plain_needs']:.2f}x"
        exponents = f"{law['exponent']:.4f} | {law['exponent_of_plain']:.4f} | {', '.join(map(str, law['exponents']))}"
        lines.append(f"| {name} | {', '.join(law['sizes'])} | {exponents} | {100 * law['off']:.1f}% | {needs} |")
    lengths = {SIZES[size].length for law in found.values() for size in law["sizes"]}
    if len(lengths) > 1:
        lines += ["", f"The windows of these sizes have {sorted(lengths)} bytes: a longer one is easier to predict."]
    return "\n".join([*lines, ""])
