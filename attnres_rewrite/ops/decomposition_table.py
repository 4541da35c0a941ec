"""The operators of this package in operators of PyTorch, for whoever does not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnres_rewrite import _compat

_table: dict[_compat.Overload, Callable[..., Any]] = {}


def register(op: _compat.Overload, decomposition: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Enter the ``decomposition`` of ``op`` here and with PyTorch.

    Args:
        op: An operator in ``torch.ops.attnres``.
        decomposition: The same in operators of PyTorch.
        fake: Shapes and dtypes of its results.
    """
    _table[op] = decomposition
    _compat.register_decomposition(op, decomposition, fake)


def decompositions() -> dict[_compat.Overload, Callable[..., Any]]:
    """What every operator of this package is in operators of PyTorch: forward and backward.

    A rewritten ``ExportedProgram`` holds one node ``attnres::block_attn_res`` a site (with the two-phase schedule
    ``attnres::attend_blocks`` and ``attnres::merge_partial``). Expanded by this table it needs this package no more:
    what it is saved as loads without it, and compilers such as ExecuTorch take it. Numbers are those of the operators,
    to rounding. ``torch.onnx.export`` finds the decompositions by itself.

    Returns:
        A new table, from operator to decomposition, as ``ExportedProgram.run_decompositions`` and ``make_fx`` take it.
        For PyTorch's own in addition: ``table = torch.export.default_decompositions()``, then ``table.update(...)``.

    Example::

        program = rewrite(torch.export.export(model, (x,)), blocks=8)
        torch.export.save(program.run_decompositions(decompositions()), "model.pt2")
    """
    return dict(_table)
