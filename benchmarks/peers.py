"""Against peers, in one run, on CPU: one read of the stream by itself, and a chain of sublayers.

One read: this package's operator, the paper's listing, fla-core's reference, and a plain residual add as the floor.
The chain: the same sublayers with plain residuals, Block AttnRes, and manifold-constrained hyper-connections (mHC)
of four streams, which compute another function and are here for the memory they move: the paper (Table 1) puts 34 d
a sublayer against 5.5 d for Block AttnRes, d being the elements of one stream value.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/peers.py [--quick] [--rows 4096] [--width 1024] [--sources 9 3]

All contestants of a table take turns in one process; figures are medians. Everything but mHC is checked against the
listing in float64 before it is timed. A peer that cannot run is in the table with the reason.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _chain import HyperConnectedChain, ResidualChain, attnres_chain, listed_chain, moved_bytes
from _environment import environment, write_results
from _peers import EPS, Form, NotAvailable, block_attn_res, naive_attnres, reason, stack_and_einsum, version
from _timing import medians
from torch import Tensor, nn

from attnres_rewrite.bench.timing import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "peers.json"
PHASES = ("forward", "forward+backward")
# The paper's Table 1, in stream values read and written per sublayer.
PAPER = {"residual": 3.0, "attnres": 5.5, "mHC": 34.0}
Calls = dict[str, Callable[[], Any]]


def residual_add(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    return sources[0] + sources[-1]


def load_forms() -> tuple[dict[str, Form], dict[str, str]]:
    """Every form of one read, compiled and eager, and the peers that are missing with the reason."""
    forms: dict[str, Form] = {"attnres_rewrite": block_attn_res, "stack and einsum": stack_and_einsum}
    skipped = {}
    try:
        forms["fla naive_attnres"] = naive_attnres()
    except Exception as error:
        skipped["fla naive_attnres"] = reason(error)
    table: dict[str, Form] = {}
    for name, form in forms.items():
        table |= {f"{name}, compiled": torch.compile(form, dynamic=False), f"{name}, eager": form}
    return table | {"residual add, eager": residual_add}, skipped


def calls_of(form: Form, sources: list[Tensor], query: Tensor, gain: Tensor, d_out: Tensor) -> Calls:
    leaves = [*sources, query, gain]

    def forward() -> Tensor:
        with torch.no_grad():
            return form(sources, query, gain)

    def forward_backward() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(form(sources, query, gain), leaves, d_out, allow_unused=True)

    return {"forward": forward, "forward+backward": forward_backward}


def check(calls: Calls, expected: dict[str, Any]) -> None:
    tolerance = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(calls["forward"](), expected["forward"].float(), rtol=tolerance, atol=tolerance)
    for found, right in zip(calls["forward+backward"](), expected["forward+backward"], strict=True):
        # Gradients of query and gain are sums over the rows: their error grows with what is summed.
        torch.testing.assert_close(found, right.float(), rtol=1e-4, atol=1e-4 * right.abs().max().item())


def measure_read(n: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    rows, width = options.rows, options.width
    sources = [torch.randn(rows, width).requires_grad_() for _ in range(n)]
    query = (torch.randn(width) / width**0.5).requires_grad_()
    gain = (1 + 0.1 * torch.randn(width)).requires_grad_()
    d_out = torch.randn(rows, width)
    wide = [t.detach().double().requires_grad_() for t in (*sources, query, gain)]
    expected = {step: call() for step, call in calls_of(stack_and_einsum, wide[:n], *wide[n:], d_out.double()).items()}

    forms, skipped = load_forms()
    contestants: dict[Any, Callable[[], Any]] = {}
    moved: dict[str, dict[str, float]] = {}
    for name, form in forms.items():
        calls = calls_of(form, sources, query, gain, d_out)
        try:
            if name.endswith("compiled"):
                moved[name] = {step: moved_bytes(call) / sources[0].nbytes for step, call in calls.items()}
            if not name.startswith("residual add"):
                check(calls, expected)
        except Exception as error:
            skipped[name] = reason(error)
            continue
        contestants |= {(name, step): call for step, call in calls.items()}
    found = medians(contestants, options.repeats, "cpu")
    names = [name for name in forms if (name, "forward") in found]
    return {
        "sources": n,
        "rows": rows,
        "width": width,
        "dtype": "float32",
        "must_move_tensors": {"forward": n + 1, "forward+backward": 3 * n + 2},
        "ms": {name: {step: round(found[name, step] * 1e3, 3) for step in PHASES} for name in names},
        "moved_tensors": {name: {step: round(t, 2) for step, t in steps.items()} for name, steps in moved.items()},
        "skipped": skipped,
    }


def make_chains(options: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    shape = (options.sublayers, options.width, options.rank)
    makers: dict[str, Callable[[], nn.Module]] = {"plain": lambda: ResidualChain(*shape)}
    for schedule in options.schedules:
        makers[f"attnres, {schedule}"] = lambda schedule=schedule: attnres_chain(*shape, options.blocks, schedule)
    makers[f"mHC, {options.streams} streams"] = lambda: HyperConnectedChain(*shape, options.streams)
    chains, skipped = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            chains[name] = make()
        except Exception as error:
            skipped[name] = reason(error)
    return chains, skipped


def expected_chain(chain: nn.Module, x: Tensor, blocks: int) -> Tensor:
    """The chain in float64, eager: as it is if it was not rewritten, else read by read."""
    if not hasattr(chain, "attn_res"):
        return copy.deepcopy(chain).double()(x.double())
    return listed_chain(copy.deepcopy(chain).double(), x.double(), blocks)


def measure_chain(options: argparse.Namespace) -> dict[str, Any]:
    chains, skipped = make_chains(options)
    x = torch.randn(1, options.chain_rows, options.width)
    d_out = torch.randn_like(x)
    contestants: dict[Any, Callable[[], Any]] = {}
    moved: dict[str, dict[str, float]] = {}
    for name, chain in chains.items():
        if not hasattr(chain, "attn_res"):
            chain.compile(dynamic=False)

        def forward(chain: nn.Module = chain) -> Tensor:
            with torch.no_grad():
                return chain(x)

        def forward_backward(chain: nn.Module = chain) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(chain(x), list(chain.parameters()), d_out, allow_unused=True)

        steps: Calls = {"forward": forward, "forward+backward": forward_backward}
        try:
            per_sublayer = x.nbytes * options.sublayers
            start = time.perf_counter()
            moved[name] = {step: moved_bytes(call) / per_sublayer for step, call in steps.items()}
            print(f"  {name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
            if not name.startswith("mHC"):
                expected = expected_chain(chain, x, options.blocks)
                torch.testing.assert_close(forward(), expected.float(), rtol=1e-4, atol=1e-4)
        except Exception as error:
            skipped[name] = reason(error)
            continue
        contestants |= {(name, step): call for step, call in steps.items()}
    found = medians(contestants, options.repeats, "cpu")
    names = [name for name in chains if (name, "forward") in found]
    result: dict[str, Any] = {
        "sublayers": options.sublayers,
        "blocks": options.blocks,
        "rows": options.chain_rows,
        "width": options.width,
        "branch_rank": options.rank,
        "paper_d_per_sublayer": PAPER,
        "skipped": skipped,
        "steps": {},
    }
    for step in PHASES:
        plain_ms, plain_moved = found["plain", step], moved["plain"][step]
        # A plain residual connection reads x and f(x) and writes x; backward likewise with their gradients.
        plain_d = PAPER["residual"] * (1 if step == "forward" else 2)
        result["steps"][step] = {
            name: {
                "ms": round(found[name, step] * 1e3, 2),
                "times_plain": round(found[name, step] / plain_ms, 3),
                "moved_d_per_sublayer": round(moved[name][step], 2),
                "residual_d_per_sublayer": round(moved[name][step] - plain_moved + plain_d, 2),
            }
            for name in names
        }
    return result


def show_read(result: dict[str, Any]) -> None:
    print("\none read, {sources} sources [{rows}, {width}] {dtype}".format(**result))
    print(f"  {'':28s} {'forward':>12s} {'fwd+bwd':>12s}   tensors moved (must: {result['must_move_tensors']})")
    for name, steps in result["ms"].items():
        moved = result["moved_tensors"].get(name)
        last = "   " + "  ".join(f"{moved[step]:7.2f}" for step in PHASES) if moved else ""
        print(f"  {name:28s} " + " ".join(f"{steps[step]:9.2f} ms" for step in PHASES) + last)
    show_skipped(result)


def show_chain(result: dict[str, Any]) -> None:
    shape = "{sublayers} sublayers, {blocks} blocks, [{rows}, {width}] float32, compiled".format(**result)
    print(f"\nchain of {shape}; paper: {result['paper_d_per_sublayer']} d a sublayer")
    for step, rows in result["steps"].items():
        print(f"  {step}: {'':20s} ms   times plain   d moved a sublayer   of these for the residual")
        for name, row in rows.items():
            figures = f"{row['ms']:9.1f} {row['times_plain']:13.2f} {row['moved_d_per_sublayer']:20.1f}"
            print(f"    {name:20s} {figures} {row['residual_d_per_sublayer']:27.1f}")
    show_skipped(result)


def show_skipped(result: dict[str, Any]) -> None:
    for name, why in result["skipped"].items():
        print(f"  {name:28s} skipped: {why}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    # Most sources first: the heap grows to its full size before anything is compared.
    parser.add_argument("--sources", type=int, nargs="+", default=[9, 3])
    parser.add_argument("--repeats", type=int, default=15)
    # mHC compiles for a long time, in proportion to the sublayers; the paper has 8 blocks.
    parser.add_argument("--sublayers", type=int, default=8, help="a multiple of --blocks")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--chain-rows", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64, help="channels that a sublayer projects through")
    parser.add_argument("--streams", type=int, default=4, help="of mHC")
    parser.add_argument("--schedules", nargs="+", default=["per_read", "two_phase"])
    parser.add_argument("--threads", type=int, help="CPU threads; one, if other processes use the cores")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.width, options.repeats = 512, 256, 5
        options.sublayers, options.blocks, options.chain_rows = 4, 4, 256
    if options.sublayers % options.blocks:
        raise NotAvailable("--sublayers must be a multiple of --blocks: the check after the listing assumes it")
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": {"eps": EPS, "repeats": options.repeats, "freed_memory_kept": keep_freed_memory()},
        "versions": {name: version(name) for name in ("fla-core", "hyper-connections", "einops")},
        "reads": [],
    }
    for n in options.sources:
        results["reads"].append(measure_read(n, options))
        show_read(results["reads"][-1])
        write_results(options.out, results)
    results["chain"] = measure_chain(options)
    show_chain(results["chain"])
    write_results(options.out, results)


if __name__ == "__main__":
    main()
