"""Phase one on a CPU: the compiled function, and what it costs to call it, beside a copy of as many bytes.

In a model the weights of a layer pass through the caches between two calls, and with the blocks they drive out what
Python needs for a call. So every call here comes after a pass over more memory than the caches hold ("cold"), and, for
comparison, right after itself ("warm"). The calls take turns; figures are medians, in microseconds.

"kernel" is the C++ function alone; "forward" and "backward" are the operators that a compiled graph calls, and
"with autograd" is the one that is differentiated. "copy" copies as many bytes as the forward reads and writes.

    python benchmarks/phase_one.py [--shapes 5x3x512x512 ...] [--threads 2] [--repeats 60] [--passes 512]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results

import attnres_rewrite.ops  # noqa: F401 (registers the operators)
from attnres_rewrite.bench.timing import keep_freed_memory, timed
from attnres_rewrite.ops import attend_blocks_cpp

RESULTS = Path(__file__).parent / "results" / "phase_one.json"
# Blocks, reads, rows, width.
SHAPES = ("2x3x512x512", "5x3x512x512", "8x3x512x512", "8x3x1024x256", "5x3x1024x1024")
SETTINGS = 1e-6, 1.0


def calls(blocks: int, reads: int, rows: int, width: int) -> dict[str, Callable[[], Any]]:
    """The contestants, on random tensors in float32."""

    def streams(count: int) -> list[torch.Tensor]:
        return [torch.randn(rows, width) for _ in range(count)]

    sources, d_mixed, added = streams(blocks), streams(reads), streams(blocks)
    vectors = [torch.randn(width) / width**0.5 for _ in range(reads)], [torch.ones(width) for _ in range(reads)]
    outputs = streams(reads), [torch.empty(rows, 1) for _ in range(reads)]
    functions, ops = attend_blocks_cpp.library(torch.float32), torch.ops.attnres
    numbers = rows, width, torch.get_num_threads(), *SETTINGS
    grads = [*d_mixed, *(torch.randn(rows, 1) for _ in range(reads))]
    flags = [True] * (blocks + 2 * reads), added, [True] * blocks
    moved = torch.randn((blocks + reads) * rows // 2, width)
    copied = torch.empty_like(moved)
    return {
        "copy": lambda: copied.copy_(moved),
        "kernel": lambda: functions.attend_lists(sources, *vectors, *outputs, *numbers),
        "forward": lambda: ops.attend_blocks_native_forward(sources, *vectors, *SETTINGS),
        "with autograd": lambda: ops.attend_blocks_native(sources, *vectors, *SETTINGS),
        "backward": lambda: ops.attend_blocks_native_backward(grads, sources, *vectors, *SETTINGS, *flags),
    }


@torch.no_grad()
def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds of every contestant, cold and warm."""
    contestants = calls(*map(int, shape.split("x")))
    memory, device = torch.ones(options.passes * 2**18), torch.device("cpu")
    times: dict[str, dict[str, list[float]]] = {state: {name: [] for name in contestants} for state in ("cold", "warm")}
    for _ in range(options.repeats):
        for name, call in contestants.items():
            memory.mul_(1.0)
            for state in ("cold", "warm"):
                times[state][name].append(1e6 * timed(call, device))
    return {
        state: {name: round(statistics.median(values), 1) for name, values in of.items()} for state, of in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="blocks x reads x rows x width")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--passes", type=int, default=512, help="MiB that are passed over before a cold call")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found = {}
    for shape in options.shapes:
        found[shape] = measure(shape, options)
        for state, of in found[shape].items():
            print(f"{shape:14s} {state}:", "  ".join(f"{name} {value:.0f}" for name, value in of.items()), flush=True)
    settings = {name: getattr(options, name) for name in ("threads", "repeats", "passes")}
    write_results(options.out, {"environment": environment(), "settings": settings, "microseconds": found})


if __name__ == "__main__":
    main()
