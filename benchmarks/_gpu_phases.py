"""Phase one of the two-phase schedule on a device: the package's kernels against Inductor's of the same equations."""

from __future__ import annotations

import argparse
import types
from typing import Any

import torch
from _gpu_timing import Budget, Call, Device, Record
from torch import Tensor

from attnres_rewrite import _compat
from attnres_rewrite.ops import attend_blocks_expanded as expansions

_SETTINGS = 1e-6, 1.0


class _Inputs:
    """``reads`` reads of ``n`` blocks ``[rows, width]`` in bfloat16, and gradients of what they give."""

    def __init__(self, n: int, reads: int, rows: int, width: int, device: str) -> None:
        torch.manual_seed(0)

        def random(count: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
            return [torch.randn(*shape, device=device, dtype=dtype) for _ in range(count)]

        self.blocks, self.gains = random(n, rows, width), random(reads, width)
        self.queries = [query / width**0.5 for query in random(reads, width)]
        self.grads = random(reads, rows, width) + random(reads, rows, 1, dtype=torch.float32)
        self.wanted = [True] * (n + 2 * reads)
        one = self.blocks[0].nbytes
        self.least = {"forward": (n + reads) * one, "backward": (2 * n + reads) * one}

    def native(self) -> dict[str, Call]:
        ops = torch.ops.attnres
        given = self.blocks, self.queries, self.gains, *_SETTINGS
        nothing = [False] * len(self.blocks)
        return {
            "forward": lambda: ops.attend_blocks_native(*given),
            "backward": lambda: ops.attend_blocks_native_backward(self.grads, *given, self.wanted, [], nothing),
        }

    def inductor(self) -> dict[str, Call]:
        def forward(blocks: list[Tensor], queries: list[Tensor], gains: list[Tensor]) -> list[Tensor]:
            return expansions.expand_forward(blocks, queries, gains, *_SETTINGS, for_inductor=True)

        def backward(blocks: list[Tensor], queries: list[Tensor], gains: list[Tensor]) -> list[Tensor]:
            given = self.grads, blocks, queries, gains, *_SETTINGS, self.wanted
            return expansions.expand_backward(*given, for_inductor=True)

        tensors = self.blocks, self.queries, self.gains
        return {"forward": _compiled(forward, tensors), "backward": _compiled(backward, tensors)}


def _compiled(function: Any, tensors: tuple[list[Tensor], ...]) -> Call:
    # Code of its own, so that it is compiled anew for every shape.
    code = function.__code__.replace(co_name="phase_one")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    compiled = torch.compile(own, dynamic=False, options={"max_fusion_size": _compat.GPU_FUSION_SIZE})

    def call() -> Any:
        with _compat.choices_for_reads():
            return compiled(*tensors)

    return call


def measure_phases(device: Device, record: Record, budget: Budget, options: argparse.Namespace) -> None:
    """Microseconds of either form, and of a copy of as many bytes as have to be moved at least."""
    record["phases"] = rows = []
    shapes = [(2, 2, 8, 64)] if options.quick else [(8, 3, 4096, 4096), (4, 3, 4096, 4096), (8, 3, 2048, 1024)]
    for n, reads, count, width in shapes:
        budget.need(40 if device.cuda else 1)
        inputs = _Inputs(n, reads, count, width, device.name)
        contestants: dict[Any, Call] = {}
        for name, calls in (("native", inputs.native()), ("inductor", inputs.inductor())):
            for step, call in calls.items():
                call()
                contestants[name, step], _ = device.captured(call)
        for step, nbytes in inputs.least.items():
            contestants["copy", step] = device.copy(nbytes)
        found = device.medians(contestants, options.repeats)
        row = {"blocks": n, "reads": reads, "rows": count, "width": width}
        rows.append(row | {f"{name}, {step}, us": round(s * 1e6, 1) for (name, step), s in found.items()})
        record.write()
        print(rows[-1], flush=True)
