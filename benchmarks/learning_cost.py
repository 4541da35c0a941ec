"""What the models of `benchmarks/learning.py` cost: parameters, time of a step, bytes moved; beside what they gain.

For every size and contestant: its parameters; a training step, the forward of a batch and one token with a key-value
cache, in rounds with the plain model in one process; and what the residual connection moves by Inductor's count, in
tensors of the stream a sublayer. The plain model beside itself says what noise does to a ratio.

    python benchmarks/learning_cost.py [--sizes 0.4M 5M] [--contestants mean-8 mhc-4] [--parts moved times]
    python benchmarks/learning_cost.py --parts moved   # counts of what would be compiled, on a busy machine too
    python benchmarks/learning_cost.py --table         # what was measured, beside the losses of the study
    python benchmarks/learning_cost.py --quick         # everything with a tiny model, not compiled

Every part of a contestant is written when it is done. One that the file has, of the same programs, is skipped: what was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The package need not be installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from _environment import environment, unpack_wheels, write_results  # noqa: E402
from _learning import CONTESTANTS, SIZES, STREAMS  # noqa: E402
from _learning_cost import ROUNDS, moved_tensors, residual_tensors, step_times  # noqa: E402
from _peers import version  # noqa: E402

from attnres_rewrite.bench.timing import keep_freed_memory  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "learning"
PARTS = ("moved", "times")
# Few rounds, to see that everything runs.
FEW = dict.fromkeys(ROUNDS, 3)
Entries = Mapping[str, Mapping[str, Any]]


def read(path: Path) -> dict[str, Any]:
    """What the file has."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"sizes": {}}
    return found


def record(path: Path, size: str, contestant: str, new: Mapping[str, Any]) -> None:
    """Put figures of a contestant into the file, and work out anew what compares it with the plain model."""
    found = read(path)
    entries = found["sizes"].setdefault(size, {})
    entries[contestant] = entries.get(contestant, {}) | new
    plain = entries.get("plain", {})
    for entry in entries.values():
        if plain:
            entry["extra_percent"] = round(100 * (entry["parameters"] / plain["parameters"] - 1), 3)
        if "moved" in plain and "moved" in entry:
            entry["residual_tensors"] = residual_tensors(entry["moved"]["tensors"], plain["moved"]["tensors"])
    ordered = {name: entries[name] for name in CONTESTANTS if name in entries}
    packages = {name: version(name) for name in ("transformers", "hyper-connections")}
    sizes = found["sizes"] | {size: ordered}
    write_results(path, {"environment": environment() | packages, "sizes": sizes})


def measure(size: str, contestant: str, part: str, rounds: Mapping[str, int]) -> dict[str, Any]:
    """The number of parameters, and the figures of one part."""
    if part == "times":
        return step_times(contestant, SIZES[size], rounds)
    return moved_tensors(contestant, SIZES[size])


def run(settings: argparse.Namespace, contestants: Sequence[str], rounds: Mapping[str, int]) -> None:
    """Measure what the file has not got."""
    now = environment()
    given = {name: now[name] for name in ("date", "commit", "sources", "cpu", "threads")}
    deadline = time.monotonic() + 60 * settings.minutes
    for size, contestant, part in itertools.product(settings.sizes, contestants, settings.parts):
        if part == "moved" and SIZES[size].backend != "inductor":
            # Nobody counts what is not compiled.
            continue
        known = read(settings.out)["sizes"].get(size, {}).get(contestant, {}).get(part, {})
        if all(known.get(name) == now[name] for name in ("sources", "threads")):
            continue
        if time.monotonic() > deadline:
            raise SystemExit("the time given is over; the same command goes on")
        start = time.monotonic()
        found = measure(size, contestant, part, rounds)
        record(settings.out, size, contestant, {"parameters": found.pop("parameters"), part: found | given})
        print(f"{size}, {contestant}, {part}: {time.monotonic() - start:.0f} s", flush=True)


def table(entries: Entries, learned: Entries) -> str:
    """The figures of one size as Markdown, with the losses of the study where there are any."""
    lines = [
        "| | parameters | training step | prefill | one token | moved, forward | with backward | test loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        steps = entry.get("times", {}).get("steps", {})
        times = [_figures(steps, kind, "{ratio:.2f} ({ratio_p10:.2f} to {ratio_p90:.2f})") for kind in ROUNDS]
        moved = entry.get("residual_tensors", {})
        loss, _ = learned.get(name, {}).get("difference", (None, None))
        cells = [
            f"+{entry['extra_percent']:.1f}%" if "extra_percent" in entry else "–",
            *times,
            *(f"{moved[phase]:.1f}" if phase in moved else "–" for phase in ("forward", "forward+backward")),
            "–" if loss is None else f"{loss:+.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figures(steps: Mapping[str, Any], kind: str, form: str) -> str:
    return form.format(**steps[kind]) if kind in steps else "–"


def show(path: Path) -> None:
    """Print the tables of all sizes."""
    losses = path.with_name("summary.json")
    learned = json.loads(losses.read_text()) if losses.exists() else {}
    for size, entries in read(path)["sizes"].items():
        print(f"**{size}**", table(entries, learned.get(size, {})), sep="\n\n", end="\n\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.4M", "5M"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no part after this time")
    parser.add_argument("--wheels", type=Path, help="folder of pure Python wheels, for hyper-connections")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json")
    return parser.parse_args()


def main() -> None:
    settings = parse()
    if settings.wheels:
        unpack_wheels(settings.wheels)
    if settings.quick:
        with tempfile.TemporaryDirectory() as folder:
            settings.out, settings.sizes = Path(folder) / "cost.json", ["quick"]
            run(settings, settings.contestants or ["plain", "mean-2"], FEW)
            show(settings.out)
        return
    here = [name for name in CONTESTANTS if name not in STREAMS or importlib.util.find_spec("hyper_connections")]
    if not settings.table:
        torch.set_num_threads(settings.threads)
        # Before anything is compiled: its helpers would be beside what is timed.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        keep_freed_memory()
        run(settings, settings.contestants or here, ROUNDS)
    show(settings.out)


if __name__ == "__main__":
    main()
