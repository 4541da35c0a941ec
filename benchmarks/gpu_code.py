"""Kernels, loads, registers and spills of a read on an H100, without one.

    python benchmarks/gpu_code.py [--widths 1024 2048 7168] [--sources 3 5 9]

Needs Triton (``pip install triton``), which compiles for a card that is not there. ``_gpu_code.py`` says how.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed.
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from _environment import environment, write_results  # noqa: E402
from _gpu_code import CARD, Case, cases, generated_code, kernels, launches, phase_one  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu_code.json"


def measure(case: Case) -> dict[str, Any]:
    code = generated_code(case.function, case.make)
    found = [
        {"kind": kernel.kind, "rows": kernel.rows, "loads": kernel.loads, "stores": kernel.stores, **kernel.resources()}
        for kernel in kernels(code)
    ]
    return {"launches": launches(code), "least": {"reads": case.reads, "writes": case.writes}, "kernels": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 7168])
    parser.add_argument("--sources", type=int, nargs="+", default=[3, 5, 9])
    parser.add_argument("--reads", type=int, default=4, help="of a block, which share phase one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "environment": environment() | {"triton": importlib.metadata.version("triton"), "compiled_for": CARD},
        "settings": {"rows": [1, 8192], "dtype": "bfloat16", "reads": options.reads},
        "shapes": [],
    }
    for width in options.widths:
        for n in options.sources:
            row: dict[str, Any] = {"width": width, "sources": n, "cases": {}}
            results["shapes"].append(row)
            print(f"\n{n} sources of {width}")
            for case in cases(n, width, (1, 8192), torch.bfloat16):
                row["cases"][case.name] = found = measure(case)
                write_results(options.out, results)
                first = found["kernels"][0]
                print(
                    f"  {case.name:46s} {found['launches']} launches; the first: {first['kind']:20s} "
                    f"{first['loads']:2d} loads, {first['stores']:2d} stores, {first['registers']:3d} registers in "
                    f"{first['warps']:2d} warps, {first['spilled_bytes']} bytes spilled",
                    flush=True,
                )
            row["phase one"] = phase_one(n - 1, options.reads, width, torch.bfloat16)
            write_results(options.out, results)
            print(f"  phase one: {row['phase one']}", flush=True)


if __name__ == "__main__":
    main()
