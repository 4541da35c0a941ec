"""The wait for a compiler that has compiled the model before: from the caches on disk, and from carried artifacts.

A Llama takes its first training step in processes of their own: with an empty cache (``cold``), once more with the
cache that it left (``disk``), and with another empty cache into which ``torch.compiler.load_cache_artifacts`` put what
``torch.compiler.save_cache_artifacts`` had saved, as on another machine (``artifacts``). Forms take turns.

    python benchmarks/warm_start.py [--layers 12] [--width 256] [--length 256] [--forms plain inline once]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed.
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from _environment import environment, write_results  # noqa: E402
from compile_layers import FORMS, make_model  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "warm_start.json"
STARTS = ("cold", "disk", "artifacts")


def first_step(form: str, start: str, saved: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Take the first step of ``form`` in this process; with an empty cache, save its artifacts to ``saved``."""
    model = make_model(form, options)
    tokens = torch.randint(8192, (2, options.length), generator=torch.Generator().manual_seed(0))
    begin, cpu = time.perf_counter(), _cpu_seconds()
    if start == "artifacts":
        torch.compiler.load_cache_artifacts(saved.read_bytes())
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    row: dict[str, Any] = {"wall_s": time.perf_counter() - begin, "cpu_s": _cpu_seconds() - cpu, "loss": loss.item()}
    row["graphs_from_cache"] = counters["aot_autograd"]["autograd_cache_hit"]
    row["graphs_compiled"] = counters["aot_autograd"]["autograd_cache_miss"]
    if start == "cold":
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        saved.write_bytes(artifacts[0])
        row["artifacts_mb"] = len(artifacts[0]) / 1e6
    return row


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every start of ``form``, each in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            cache = Path(folder) / ("elsewhere" if start == "artifacts" else "cache")
            command = [sys.executable, __file__, *sys.argv[1:], "--one", form, start, str(Path(folder) / "artifacts")]
            set_ = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            run = subprocess.run(command, env=os.environ | set_, stdout=subprocess.PIPE, text=True, check=True)
            found[start] = json.loads(run.stdout.splitlines()[-1])
            print(form, start, found[start], flush=True)
    losses = {round(row["loss"], 6) for row in found.values()}
    assert len(losses) == 1, f"{form}: the losses of the starts differ: {losses}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["plain", "inline", "once"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        form, start, saved = options.one
        print(json.dumps(first_step(form, start, Path(saved), options)))
        return
    sizes = {name: getattr(options, name) for name in ("layers", "width", "length", "blocks")}
    results: dict[str, Any] = {"environment": environment(), "sizes": sizes, "forms": {}}
    for form in options.forms:
        results["forms"][form] = measure(form, options)
        write_results(options.out, results)


if __name__ == "__main__":
    main()
