"""The operator against the copy-bandwidth bound and against the stack-and-einsum form.

The bound is the time that copying would take for the bytes that must move: forward reads n sources and writes one
result; backward reads n sources and one gradient and writes n gradients. The compiled forms take turns in one
process, and then the eager ones; every call comes right after such a copy, so that what else the machine does hits both
alike. Figures are medians, and ratios to that copy are what counts.

    python benchmarks/op.py [--device cuda] [--repeats 15] [--sources 9 3]

On CPU, memory that is freed stays with the process (as it does with CUDA's caching allocator); otherwise every result
of 16 MiB costs page faults that take longer than the operator. ``--default-allocator`` leaves them in.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from torch import Tensor

import attnres_rewrite.ops  # noqa: F401 (registers the operator)
from attnres_rewrite.bench.timing import keep_freed_memory, timed

RESULTS = Path(__file__).parent / "results" / "op.json"
EPS = 1e-6
# What the compiler reaches for the bytes of a forward when there is next to nothing to compute.
SUM = "sum of sources, compiled"
Form = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def op(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    return torch.ops.attnres.block_attn_res(sources, query, gain, EPS, 1.0, False)


def stack_and_einsum(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """The paper's listing: sources stacked to [n, rows, D]."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * gain
    alpha = torch.softmax(torch.einsum("d,nrd->nr", query, keys), 0)
    return torch.einsum("nr,nrd->rd", alpha, values)


def steps(form: Form, sources: list[Tensor], query: Tensor, gain: Tensor) -> dict[str, Callable[[], Any]]:
    leaves = [*sources, query, gain]
    d_out = torch.randn_like(sources[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return form(sources, query, gain)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(sources, query, gain), leaves, d_out)

    return {"forward": forward, "forward+backward": forward_backward}


def interleave(
    contestants: dict[tuple[str, str], Callable[[], Any]], copies: dict[str, Callable[[], Any]], options: Any
) -> dict[tuple[str, str], dict[str, float]]:
    """Median milliseconds of every contestant, and of its time over that of a copy right before it.

    The contestants take turns; a neighbour on the machine slows a call and the copy beside it alike.
    """
    device = torch.device(options.device)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in contestants}
    for turn in range(options.repeats + 2):
        for key, call in contestants.items():
            copy = timed(copies[key[1]], device)
            pair = timed(call, device), copy
            if turn >= 2:
                times[key].append(pair)
    return {
        key: {
            "ms": round(1e3 * statistics.median(time for time, _ in pairs), 3),
            "times_bound": round(statistics.median(time / copy for time, copy in pairs), 2),
        }
        for key, pairs in times.items()
    }


def measure(n: int, rows: int, width: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    make = {"device": options.device, "dtype": dtype}
    sources = [torch.randn(rows, width, **make).requires_grad_() for _ in range(n)]
    query = (torch.randn(width, **make) / width**0.5).requires_grad_()
    gain = torch.ones(width, **make).requires_grad_()
    forms: dict[str, Form] = {
        "op, compiled": torch.compile(op),
        "op, eager": op,
        "einsum, compiled": torch.compile(stack_and_einsum),
        "einsum, eager": stack_and_einsum,
    }
    contestants: dict[tuple[str, str], Callable[[], Any]] = {}
    expected = stack_and_einsum([source.double() for source in sources], query.double(), gain.double()).to(dtype)
    tolerance = 16 * torch.finfo(dtype).eps
    for name, form in forms.items():
        torch.testing.assert_close(form(sources, query, gain), expected, rtol=tolerance, atol=tolerance)
        for step, call in steps(form, sources, query, gain).items():
            contestants[name, step] = call
    moved = {"forward": n + 1, "forward+backward": 3 * n + 2}
    copies = {step: copy_of(tensors * rows * width // 2, make) for step, tensors in moved.items()}
    added = torch.compile(lambda sources: sum(sources[1:], sources[0]))
    contestants[SUM, "forward"] = torch.no_grad()(lambda: added(sources))
    # Eager forms leave the heap and the caches as no compiled model does, so that they take turns of their own.
    found: dict[tuple[str, str], dict[str, float]] = {}
    for eager in (False, True):
        group = {key: call for key, call in contestants.items() if key[0].endswith("eager") is eager}
        found |= interleave(group, copies, options)
    result: dict[str, Any] = {"sources": n, "rows": rows, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    result["steps"] = {step: {name: figure for (name, of), figure in found.items() if of == step} for step in moved}
    return result


def copy_of(elements: int, make: dict[str, Any]) -> Callable[[], Any]:
    """A copy of so many numbers; it reads them and writes as many."""
    origin = torch.randn(elements, **make)
    target = torch.empty_like(origin)
    return lambda: target.copy_(origin)


def show(result: dict[str, Any]) -> None:
    print("\n{sources} sources [{rows}, {width}] {dtype}".format(**result), flush=True)
    for step, figures in result["steps"].items():
        print(f"  {step}")
        for name, figure in figures.items():
            print(f"    {name:24s} {figure['ms']:9.2f} ms  {figure['times_bound']:6.2f} x bound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    # Most sources first: the heap grows to its full size before anything is compared.
    parser.add_argument("--sources", type=int, nargs="+", default=[9, 3])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads; one, if other processes use the cores")
    parser.add_argument("--default-allocator", action="store_true", help="do not keep freed memory (CPU)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    kept = options.device == "cpu" and not options.default_allocator and keep_freed_memory()
    sizes = [(4096, 1024, torch.float32)]
    if options.device == "cuda":
        sizes += [(32768, 1024, torch.float32), (32768, 1024, torch.bfloat16), (16384, 4096, torch.bfloat16)]
    results = []
    for size in sizes:
        for n in options.sources:
            results.append(measure(n, *size, options))
            show(results[-1])
    found = {"environment": environment(), "device": options.device, "repeats": options.repeats}
    write_results(options.out, found | {"freed_memory_kept": kept, "results": results})


if __name__ == "__main__":
    main()
