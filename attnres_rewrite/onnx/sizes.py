"""The dynamic sizes of a program's inputs: what each is, and which to try that were not traced."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import tensor_of

Shape = tuple[int | torch.SymInt, ...]


@dataclasses.dataclass(frozen=True)
class DynamicSize:
    """A size that the caller of an exported model chooses.

    Attributes:
        name: ``"batch"``, ``"sequence"`` or ``"past_sequence"``, the length of what a cache holds.
        symbols: The program's symbols that stand for it. Inputs whose sizes were equal when traced stay so.
        traced: What it was when traced.
        smallest: The smallest that it may be.
        largest: The largest.
        cached: Whether the program goes on from a cache.
    """

    name: str
    symbols: tuple[str, ...]
    traced: int
    smallest: int
    largest: float
    cached: bool

    def others(self) -> tuple[int, ...]:
        """Three sizes that were not traced."""
        changes = _CHANGES["token" if self.cached and self.name == "sequence" else self.name]
        return tuple(int(min(self.largest, max(self.smallest, change(self.traced)))) for change in changes)


# With a cache: a single token, then a prompt into an empty cache, then a few tokens at once.
_CHANGES: dict[str, tuple[Callable[[int], int], ...]] = {
    "batch": (lambda n: n + 1, lambda n: n + 2, lambda n: n - 1),
    "sequence": (lambda n: n - 1, lambda n: n // 2, lambda n: n + 1),
    "token": (lambda n: n - 1, lambda n: n + 3, lambda n: n + 1),
    "past_sequence": (lambda n: n - 1, lambda n: 0, lambda n: n + 1),
}


def default_dynamic_dims(tensor: Tensor) -> dict[int, Any]:
    """Batch and sequence, the first two dimensions, of integers; the batch of everything else."""
    count = 1 if tensor.is_floating_point() else 2
    return dict.fromkeys(range(min(count, tensor.dim())), Dim.DYNAMIC)


def dynamic_sizes(program: ExportedProgram, smallest: int = 1) -> list[DynamicSize]:
    """The sizes to choose in a call of ``program``, in the order in which its inputs show them.

    Args:
        program: The program.
        smallest: What to take for the smallest where the program was merely traced for at least two.
    """
    found = _symbols(program)
    cached = _is_cached(program)
    traced: dict[tuple[str, int], list[str]] = {}
    for symbol, (dim, hint) in found.items():
        name = "batch" if dim == 0 else "past_sequence" if cached and dim > 1 else "sequence"
        traced.setdefault((name, hint), []).append(symbol)
    bounds = {str(symbol): _compat.bounds(values) for symbol, values in program.range_constraints.items()}
    sizes = []
    for (name, hint), symbols in traced.items():
        lower, upper = max(bounds[symbol][0] for symbol in symbols), min(bounds[symbol][1] for symbol in symbols)
        lowest = 0 if name == "past_sequence" else smallest if lower <= 2 else lower
        sizes.append(DynamicSize(name, tuple(symbols), hint, lowest, upper, cached))
    covered = _covered(sizes)
    return [size for size in sizes if size is not covered]


def size_names(program: ExportedProgram) -> dict[str, str]:
    """A name for every symbol of the program's inputs, where there is one that says what it is."""
    sizes = dynamic_sizes(program)
    names = [size.name for size in sizes]
    # Lengths that were merely equal when traced may differ in a call; a batch is one for all inputs.
    single = [s for s in sizes if names.count(s.name) == 1 and (s.name == "batch" or len(s.symbols) == 1)]
    named = {symbol: size.name for size in single for symbol in size.symbols}
    return named | dict.fromkeys(_covered_by(program, sizes), "past_sequence + sequence")


def values_at(program: ExportedProgram, chosen: dict[str, int]) -> dict[str, int]:
    """``chosen``, the values of symbols, with those of the symbols that follow from them."""
    sizes = dynamic_sizes(program)
    total = sum(chosen[size.symbols[0]] for size in sizes if size.name in ("sequence", "past_sequence"))
    return chosen | dict.fromkeys(_covered_by(program, sizes), total)


def _covered_by(program: ExportedProgram, sizes: list[DynamicSize]) -> set[str]:
    """The symbols that no size stands for: how much a mask covers."""
    return set(_symbols(program)) - {symbol for size in sizes for symbol in size.symbols}


def renamed(text: str, names: dict[str, str]) -> str:
    """An expression over symbols in the names of ``names``."""
    return re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), text)


def given_shapes(program: ExportedProgram) -> dict[str, Shape]:
    """Name and shape of every tensor that the caller of ``program`` gives, in order."""
    users = set(program.graph_signature.user_inputs)
    nodes = (n for n in program.graph.nodes if n.op == "placeholder" and n.name in users)
    return {n.name: tuple(value.shape) for n in nodes if (value := tensor_of(n)) is not None}


def _symbols(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """For every symbol that is by itself the size of an input: the first dimension it is of, and its traced value."""
    known = {str(symbol) for symbol in program.range_constraints}
    found: dict[str, tuple[int, int]] = {}
    for shape in given_shapes(program).values():
        for dim, size in enumerate(shape):
            if not isinstance(size, int) and str(size) in known:
                found.setdefault(str(size), (dim, _compat.size_hint(size)))
    return found


def _is_cached(program: ExportedProgram) -> bool:
    return any("past_key_values" in str(name) for name in program.graph_signature.user_inputs)


def _covered(sizes: list[DynamicSize]) -> DynamicSize | None:
    """What a mask covers is the cache and the new tokens together, so it cannot be chosen."""
    past = next((size.traced for size in sizes if size.name == "past_sequence"), None)
    new = next((size.traced for size in sizes if size.name == "sequence"), None)
    if past is None or new is None:
        return None
    return next((size for size in sizes if size.name == "sequence" and size.traced == past + new), None)
