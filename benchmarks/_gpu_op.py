"""One read of the stream on a device: this package's operator and the fused kernels of its peers."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _gpu_timing import Budget, Call, Device, Record
from _peers import CUDA_PEERS, Form, block_attn_res, reason, stack_and_einsum, without_caches, without_folders
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering

from attnres_rewrite import _compat

TARGETS = {"forward": 0.88, "forward+backward": 0.75}
OURS = "attnres_rewrite"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sources ``[batch, length, width]``, n of them."""

    batch: int
    length: int
    width: int
    n: int
    dtype: torch.dtype = torch.bfloat16

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


def small_shapes(quick: bool, dtype: torch.dtype, sources: tuple[int, ...]) -> list[Shape]:
    return [Shape(2, 64, 64, n, dtype) if quick else Shape(2, 1024, 1024, n, dtype) for n in sources]


def published_shape(quick: bool) -> Shape:
    """The shape that others have published times for."""
    return Shape(1, 128, 128, 9) if quick else Shape(1, 8192, 7168, 9)


def big_shape(quick: bool) -> Shape:
    return Shape(2, 128, 64, 9) if quick else Shape(4, 16384, 2048, 9)


def compiled_read() -> Form:
    """The operator, compiled as the backend "attnres" asks Inductor to on a GPU; code of its own, so compiled anew."""
    function = types.FunctionType(block_attn_res.__code__.replace(co_name="site"), block_attn_res.__globals__)
    compiled = torch.compile(function, dynamic=False, options={"max_fusion_size": _compat.GPU_FUSION_SIZE})

    def form(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
        with _compat.choices_for_reads():
            out: Tensor = compiled(sources, query, gain)
        return out

    return form


def forms_of_one_read(*, with_einsum: bool) -> dict[str, Callable[[], Form]]:
    forms: dict[str, Callable[[], Form]] = {OURS: compiled_read}
    forms |= {name: load for name, (_, load) in CUDA_PEERS.items()}
    if with_einsum:
        forms["stack and einsum, compiled"] = lambda: torch.compile(stack_and_einsum, dynamic=False)
    return forms


class Inputs:
    """Leaves of one read, and its result and gradients in float64."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        size = (shape.batch, shape.length, shape.width)
        make: dict[str, Any] = {"device": device, "dtype": shape.dtype}
        self.sources = [torch.randn(size, **make).requires_grad_() for _ in range(shape.n)]
        self.query = (torch.randn(shape.width, **make) / shape.width**0.5).requires_grad_()
        self.gain = (1 + 0.1 * torch.randn(shape.width, **make)).requires_grad_()
        self.leaves = [*self.sources, self.query, self.gain]
        self.d_out = torch.randn(size, **make)

    def calls(self, form: Form) -> dict[str, Call]:
        def forward() -> Tensor:
            with torch.no_grad():
                return form(self.sources, self.query, self.gain)

        def forward_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(form(self.sources, self.query, self.gain), self.leaves, self.d_out)

        return {"forward": forward, "forward+backward": forward_backward}

    def expected(self, rows: int = 4096) -> list[Tensor]:
        """Result and gradients of the sources, in float64, for the first ``rows`` rows; then those of query and gain.

        A float64 copy of everything would not fit in memory for the largest shape, and rows do not depend on each
        other; query and gain are left out where rows are.
        """
        width = self.query.numel()
        flat = [t.detach().reshape(-1, width) for t in (*self.sources, self.d_out)]
        wide = [t[:rows].double().requires_grad_() for t in flat[:-1]]
        query, gain = (t.detach().double().requires_grad_() for t in (self.query, self.gain))
        out = stack_and_einsum(wide, query, gain)
        grads = torch.autograd.grad(out, [*wide, query, gain], flat[-1][:rows].double())
        return [out.detach(), *(grads if flat[0].shape[0] <= rows else grads[:-2])]

    def check(self, calls: dict[str, Call], expected: list[Tensor]) -> float:
        """The largest error relative to the largest value of its tensor; raises where it is too large."""
        found = [calls["forward"](), *calls["forward+backward"]()]
        worst = 0.0
        for given, right in zip(found, expected, strict=False):
            rows = given.reshape(-1, right.shape[-1])[: right.reshape(-1, right.shape[-1]).shape[0]]
            difference = (rows.double() - right.reshape(rows.shape)).abs().max() / right.abs().max()
            worst = max(worst, difference.item())
        limit = max(4 * torch.finfo(self.d_out.dtype).eps, 1e-4)
        if not worst <= limit:
            raise ValueError(f"wrong result: {worst:.2g} of the largest value off, {limit:.2g} is allowed")
        return worst


def measure_shape(shape: Shape, device: Device, repeats: int, budget: Budget, *, with_einsum: bool) -> dict[str, Any]:
    inputs = Inputs(shape, device.name)
    expected = inputs.expected()
    contestants: dict[Any, Call] = {}
    forms: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name, load in forms_of_one_read(with_einsum=with_einsum).items():
        try:
            budget.need(10 if device.cuda else 1)
            calls = inputs.calls(load())
            forms[name] = {"error": inputs.check(calls, expected), "not_captured": {}}
        except Exception as error:
            skipped[name] = reason(error)
            continue
        for step, call in calls.items():
            contestants[name, step], why = device.captured(call)
            if why:
                forms[name]["not_captured"][step] = why
    one = inputs.d_out.nbytes
    moved = {"forward": (shape.n + 1) * one, "forward+backward": (3 * shape.n + 2) * one}
    for step, nbytes in moved.items():
        contestants["copy of as many bytes", step] = device.copy(nbytes)
    found = device.medians(contestants, repeats)
    bandwidth = device.copy_bandwidth((1 << 31) if device.cuda else (1 << 25))
    for name in [*forms, "copy of as many bytes"]:
        row = forms.setdefault(name, {})
        for step, nbytes in moved.items():
            seconds = found[name, step]
            fraction = nbytes / seconds / bandwidth
            row[step] = {"us": round(seconds * 1e6, 2), "of_copy_bandwidth": round(fraction, 3)}
    return shape.to_json() | {"copy_GB_per_s": round(bandwidth / 1e9, 1), "forms": forms, "skipped": skipped}


def show(result: dict[str, Any]) -> None:
    print("\n{n} sources [{batch}, {length}, {width}] {dtype}, copy {copy_GB_per_s} GB/s".format(**result))
    for name, row in result["forms"].items():
        figures = "   ".join(
            f"{step} {row[step]['us']:9.1f} us {row[step]['of_copy_bandwidth']:5.0%} (target {target:.0%})"
            for step, target in TARGETS.items()
        )
        print(f"  {name:28s} {figures}  {'not captured' if row.get('not_captured') else ''}")
    for name, why in result["skipped"].items():
        print(f"  {name:28s} skipped: {why}")


def measure_shapes(
    key: str, shapes: list[Shape], device: Device, record: Record, budget: Budget, options: argparse.Namespace
) -> None:
    """One entry per shape under ``key``, written as soon as it is there."""
    record[key] = {"targets_of_copy_bandwidth": TARGETS, "shapes": []}
    for shape in shapes:
        budget.need(20 if device.cuda else 1)
        with_einsum = shape.batch * shape.length * shape.width <= 1 << 22
        result = measure_shape(shape, device, options.repeats, budget, with_einsum=with_einsum)
        record[key]["shapes"].append(result)
        record.write()
        show(result)


def in_registers_or_looped(device: Device, record: Record, budget: Budget, options: argparse.Namespace) -> None:
    """One read at several widths, its sources kept in registers between the two passes over them, or read twice."""
    record["registers"] = rows = []
    for width in (64, 128) if options.quick else (1024, 2048, 4096, 7168):
        shape = Shape(1, 64 if options.quick else 8192, width, 9)
        inputs = Inputs(shape, device.name)
        contestants: dict[Any, Call] = {}
        for name, limit in (("looped", 0), ("in registers", 1 << 14)):
            budget.need(15 if device.cuda else 1)
            with without_caches(), mock.patch.object(_compat, "_WIDTH_IN_REGISTERS", limit):
                for step, call in inputs.calls(compiled_read()).items():
                    call()
                    contestants[name, step], _ = device.captured(call)
        found = device.medians(contestants, options.repeats)
        rows.append(shape.to_json() | {f"{name}, {step}": round(s * 1e6, 1) for (name, step), s in found.items()})
        record.write()
        print(rows[-1], flush=True)


def kernels_of_one_site(device: Device, record: Record, folder: Path, options: argparse.Namespace) -> None:
    """How many kernels one read compiles to, and their code as files in ``folder``."""
    shape = small_shapes(options.quick, torch.bfloat16, (9,))[0]
    inputs = Inputs(shape, device.name)
    found: dict[str, Any] = {"shape": shape.to_json(), "kernels": {}, "code": {}}
    suffix = "cuda" if device.cuda else "cpu"
    # Nothing is reset: graphs that other sections captured read the memory of what they compiled.
    with without_caches():
        for step, call in inputs.calls(compiled_read()).items():
            metrics.reset()
            code: list[str] = []
            # Inductor's hook for tests; its own helper around it resets Dynamo.
            with mock.patch.object(GraphLowering, "save_output_code", code.append):
                call()
            found["kernels"][step] = metrics.generated_kernel_count
            path = folder / f"site_{step.replace('+', '_')}_{suffix}.py"
            path.write_text(without_folders("\n\n# The next graph\n\n".join(code)))
            found["code"][step] = path.name
    record["kernels"] = found
    print(f"\nkernels of one site: {found['kernels']}; code in {', '.join(found['code'].values())}")
