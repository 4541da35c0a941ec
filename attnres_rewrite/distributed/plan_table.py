"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnres_rewrite.distributed.planning import Plan

_UNITS = ("B", "kB", "MB", "GB", "TB")


def table_of(plan: Plan) -> str:
    """The plan for people: what each pipeline rank holds, then what crosses between the stages."""
    return "\n".join([*_head(plan), "", *_ranks(plan), *(["", *_transitions(plan)] if plan.transitions else [])])


def readable(size: float) -> str:
    """A number of bytes in its largest unit, of a thousand of the one below."""
    power = 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.2f} {_UNITS[power]}" if power else f"{size:.0f} B"


def _head(plan: Plan) -> Iterator[str]:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one process"
    size = plan.size
    yield f"{size.name}: {size.layers} layers of width {size.width}, blocks of {list(plan.blocks)} layers"
    stages = f"{plan.virtual_stages} stage{'s' * (plan.virtual_stages > 1)} a pipeline rank"
    yield f"mesh: {mesh}; {stages}; {plan.tokens} tokens a process"
    traffic = plan.memory_traffic
    yield (
        f"residual connections move {readable(traffic['two_phase'])} a token in memory in two phases, "
        f"{readable(traffic['plain'])} plain"
    )


def _ranks(plan: Plan) -> Iterator[str]:
    rows = [
        (
            str(i),
            str(r.layers),
            f"{r.parameters:,}",
            f"{r.site_parameters:,}",
            str(r.block_sums),
            readable(r.block_sum_bytes),
        )
        for i, r in enumerate(plan.ranks)
    ]
    return _aligned([("rank", "layers", "parameters", "of sites", "block sums", "their bytes"), *rows])


def _transitions(plan: Plan) -> Iterator[str]:
    rows = [
        (f"{one.source} -> {one.target}", *(readable(value) for value in (one.plain, one.naive, one.cached)))
        for one in plan.transitions
    ]
    total = [readable(sum(getattr(one, way) for one in plan.transitions)) for way in ("plain", "naive", "cached")]
    return _aligned([("bytes a token", "plain", "naive", "cached"), *rows, ("all", *total)])


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
