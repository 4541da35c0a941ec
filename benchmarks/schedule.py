"""Where the two-phase schedule pays: the reads of one block, read by read and in two phases.

A block with S reads over n complete blocks is compiled in both schedules, with an RMS norm after every read and, in
place of each sublayer, a copy that Inductor cannot see into; so adds and norms fuse with the sites as they do in a
model. Steps of the two take turns; the ratio of medians is what counts. One row is the decoding of one token.

    python benchmarks/schedule.py [--width 512] [--rows 1 512 4096] [--shapes 4x4 8x2 8x6]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from _timing import medians
from op import EPS
from torch import Tensor

import attnres_rewrite.ops  # noqa: F401 (registers the operators)
from attnres_rewrite.bench.timing import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "schedule.json"
attnres = torch.ops.attnres


@torch.library.custom_op("attnres_benchmark::sublayer", mutates_args=())
def sublayer(x: Tensor) -> Tensor:
    """One read and one write of the stream."""
    return x.clone()


sublayer.register_fake(torch.empty_like)
sublayer.register_autograd(lambda _, grad: torch.ops.attnres_benchmark.sublayer(grad))


def per_read(blocks: list[Tensor], queries: list[Tensor], gains: list[Tensor], norm: Tensor) -> Tensor:
    partial = None
    for query, gain in zip(queries, gains, strict=True):
        sources = [*blocks] if partial is None else [*blocks, partial]
        partial = _branch(attnres.block_attn_res(sources, query, gain, EPS, 1.0, False), norm, partial)
    return partial


def two_phase(blocks: list[Tensor], queries: list[Tensor], gains: list[Tensor], norm: Tensor) -> Tensor:
    partial = None
    shared = attnres.attend_blocks(blocks, queries, gains, EPS, 1.0)
    for read, (query, gain) in enumerate(zip(queries, gains, strict=True)):
        phase_one = shared[read], shared[len(queries) + read]
        partial = _branch(attnres.merge_partial(*phase_one, partial, query, gain, EPS, 1.0, 1.0), norm, partial)
    return partial


def _branch(h: Tensor, norm: Tensor, partial: Tensor | None) -> Tensor:
    f = torch.ops.attnres_benchmark.sublayer(torch.nn.functional.rms_norm(h, norm.shape, norm, EPS))
    return f if partial is None else partial + f


def calls(form: Callable[..., Tensor], inputs: list[Any], leaves: list[Tensor]) -> dict[str, Callable[[], Any]]:
    torch._dynamo.reset()
    compiled = torch.compile(form, dynamic=False)
    d_out = torch.randn_like(inputs[0][0])

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(*inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(*inputs), leaves, d_out)

    both = {"forward": forward, "forward+backward": forward_backward}
    for call in both.values():
        call()
    return both


def measure(blocks: int, reads: int, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    width = options.width

    def make(count: int, *shape: int) -> list[Tensor]:
        return [torch.randn(*shape).requires_grad_() for _ in range(count)]

    queries = [(torch.randn(width) / width**0.5).requires_grad_() for _ in range(reads)]
    inputs = [make(blocks, rows, width), queries, make(reads, width), make(1, width)[0]]
    leaves = [*inputs[0], *inputs[1], *inputs[2], inputs[3]]
    # A chain of reads in float32, summed in another order.
    torch.testing.assert_close(two_phase(*inputs), per_read(*inputs), rtol=1e-4, atol=1e-4)
    contestants = {}
    for name, form in (("per_read", per_read), ("two_phase", two_phase)):
        contestants |= {(name, step): call for step, call in calls(form, inputs, leaves).items()}
    found = medians(contestants, options.repeats, "cpu")
    result: dict[str, Any] = {"blocks": blocks, "reads": reads, "rows": rows, "width": width}
    for step in ("forward", "forward+backward"):
        one, two = found["per_read", step], found["two_phase", step]
        result[step] = {"per_read_ms": one * 1e3, "two_phase_ms": two * 1e3, "ratio": two / one}
    return result


def main() -> None:
    """Measure, print, and write the results after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 512, 1])
    parser.add_argument("--shapes", nargs="+", default=["4x4", "8x2", "8x6"], help="blocks x reads of a block")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    keep_freed_memory()
    results = []
    for shape in options.shapes:
        for rows in options.rows:
            found = measure(*(int(count) for count in shape.split("x")), rows, options)
            results.append(found)
            ratios = "  ".join(f"{step} {found[step]['ratio']:.3f}" for step in ("forward", "forward+backward"))
            print(f"{shape:>6} (blocks x reads), {rows:5d} rows: two phases / read by read: {ratios}", flush=True)
            write_results(options.out, {"environment": environment(), "repeats": options.repeats, "results": results})


if __name__ == "__main__":
    main()
