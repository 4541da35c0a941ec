"""Block AttnRes in a whole model, against the same model compiled without it.

A Llama-architecture model runs plain and rewritten. Step times of both are interleaved in one process, and the median
of the ratios of the rounds is what counts; `attnres_rewrite.bench` measures, for any model. For a single size compile
time (cold cache) and peak memory are measured too, in a process of their own for each form.

    python benchmarks/end_to_end.py [--layers 12] [--width 512] [--length 256] [--batch 2] [--blocks 8]
    python benchmarks/end_to_end.py --grid [--kinds inference] [--layers 6 12] [--seconds 20]

The grid is 27 sizes, each in a process of its own. Every size is written when it is done, and a kind of step that the
file has of it from the same commit is skipped: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from transformers import LlamaConfig

from attnres_rewrite.bench import BenchResult, BenchSettings, compare, run_alone
from attnres_rewrite.named_models import load_model

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
VOCABULARY, HEAD = 8192, 64
SINGLE = {"layers": [12], "width": [512], "length": [256]}
GRID = {"layers": [6, 12, 24], "width": [256, 512, 1024], "length": [128, 512, 1024]}
KINDS = ("training", "inference", "decode")
# Sequences of a batch of the grid have this many tokens together.
TOKENS = 1024
# What compiling and timing all kinds of step took on two cores, for a first estimate: seconds, and seconds a layer.
PRIOR = (40.0, 25.0)


def save_config(folder: Path, layers: int, width: int) -> None:
    """Write the configuration of a Llama of this size."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
    )
    config.save_pretrained(folder)


def settings_of(size: dict[str, int], options: argparse.Namespace, kinds: Collection[str]) -> BenchSettings:
    return BenchSettings(
        blocks=min(options.blocks, size["layers"]),
        schedule=options.schedule,
        batch=size["batch"],
        length=size["length"],
        rounds=options.rounds,
        warmup=options.warmup,
        seconds=options.seconds,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        **{kind: kind in kinds for kind in KINDS},
    )


def measure(size: dict[str, int], settings: BenchSettings, *, alone: bool) -> BenchResult:
    """All figures of one size; for a process of its own, as what one size leaves behind is not for the next."""
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), size["layers"], size["width"])
        device = str(settings.resolve_device())
        result = compare(lambda: load_model(folder, device), settings, progress=lambda text: print(f"  {text}"))
        if alone:
            print("  Measuring compile times and memory of either form alone", flush=True)
            result = dataclasses.replace(result, alone=run_alone(folder, settings))
    return result


def measure_apart(size: dict[str, int], settings: BenchSettings, *, alone: bool) -> BenchResult:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, size, settings, alone=alone).result()


def entry(size: dict[str, int], result: BenchResult, commit: str | None) -> dict[str, Any]:
    """What the file has of one size."""
    found = result.to_dict()
    for times in found["times"].values():
        times["commit"] = commit
    kept = ("parameters", "cached", "times", "skipped", *(["alone"] if result.alone else []))
    return {**key_of(size, result.settings), **{name: found[name] for name in kept}}


def key_of(size: dict[str, int], settings: BenchSettings) -> dict[str, Any]:
    """What tells the entry of one size from the others; one of another machine does not belong into the file."""
    names = ("blocks", "schedule", "dtype", "threads")
    return {**size, **{name: getattr(settings, name) for name in names}, "device": str(settings.resolve_device())}


def find(entries: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    return next((e for e in entries if key.items() <= e.items()), None)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The sizes that the file has; none if it is of another form."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    sizes: list[dict[str, Any]] = found.get("sizes", [])
    return sizes


def record(path: Path, new: dict[str, Any], key: dict[str, Any], commit: str | None) -> None:
    """Put the entry of a size into the file; of the one that it has of it, the kinds of step not measured now stay."""
    entries = read_entries(path)
    old = find(entries, key)
    if old is not None:
        entries.remove(old)
        new = merged(old, new)
    entries.append(new)
    entries.sort(key=lambda e: (e["layers"], e["width"], e["length"], e["batch"]))
    write_results(path, {"environment": {**environment(), "commit": commit}, "sizes": entries})


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entry ``new``, with what ``old`` has of kinds of step that were not measured for it."""
    done = {*new["times"], *new["skipped"]}
    for part in ("times", "skipped"):
        new[part] |= {kind: found for kind, found in old[part].items() if kind not in done}
    if "decode" not in done:
        new["cached"] = old["cached"]
    for form, figures in old.get("alone", {}).items():
        kinds = new.setdefault("alone", {}).setdefault(form, {**figures, "kinds": {}})["kinds"]
        kinds |= {kind: found for kind, found in figures["kinds"].items() if kind not in kinds}
    return new


def sizes_of(options: argparse.Namespace) -> Iterator[dict[str, int]]:
    """The sizes to measure; in the grid a batch has ``TOKENS`` tokens unless the options say otherwise."""
    axes = {name: getattr(options, name) or default for name, default in (GRID if options.grid else SINGLE).items()}
    for values in itertools.product(*axes.values()):
        size = dict(zip(axes, values, strict=True))
        yield {**size, "batch": options.batch or (max(1, TOKENS // size["length"]) if options.grid else 2)}


class Remaining:
    """An estimate of the time that is left, from the time that the sizes before took."""

    def __init__(self, sizes: list[dict[str, int]]) -> None:
        self.left = list(sizes)
        self.took = self.expected = 0.0

    @staticmethod
    def prior(size: dict[str, int]) -> float:
        return PRIOR[0] + PRIOR[1] * size["layers"]

    def done(self, size: dict[str, int], seconds: float | None) -> None:
        """Count ``size`` as done; ``None``: without taking time."""
        self.left.remove(size)
        if seconds is not None:
            self.took += seconds
            self.expected += self.prior(size)

    def __str__(self) -> str:
        slower = self.took / self.expected if self.expected else 1.0
        minutes = slower * sum(map(self.prior, self.left)) / 60
        return f"{len(self.left)} sizes left, about {minutes:.0f} min"


def run(options: argparse.Namespace) -> None:
    """Measure what the file has not got from this commit; a single size in any case, and its memory with it."""
    sizes, commit = list(sizes_of(options)), environment()["commit"]
    remaining = Remaining(sizes)
    for size in sizes:
        key = key_of(size, settings_of(size, options, KINDS))
        known = (find(read_entries(options.out), key) or {}).get("times", {}) if options.grid else {}
        # Two trees that were changed may differ, though the commit below them is one.
        fixed = commit is not None and not commit.endswith("-dirty")
        kinds = [kind for kind in options.kinds if not fixed or known.get(kind, {}).get("commit") != commit]
        if not kinds:
            remaining.done(size, None)
            continue
        print(f"{_words(size)} ({remaining})", flush=True)
        start = time.perf_counter()
        try:
            result = measure_apart(size, settings_of(size, options, kinds), alone=not options.grid)
        except BrokenProcessPool:
            # Out of memory, as a rule; the sizes after it may be smaller.
            print("  the process was killed, so there are no figures of this size", flush=True)
        else:
            record(options.out, entry(size, result, commit), key, commit)
            show(result)
        remaining.done(size, time.perf_counter() - start)


def show(result: BenchResult) -> None:
    for kind, times in result.times.items():
        low, high = times.spread
        figures = f"plain {times.plain_ms:8.1f} ms  attnres {times.rewritten_ms:8.1f} ms  ratio {times.ratio:.3f}"
        print(f"  {kind:10s} {figures} ({low:.3f} to {high:.3f}, {len(times.ratios)} rounds)", flush=True)
    for form, figures in (result.alone or {}).items():
        for kind, alone in figures.kinds.items():
            share = f" ({alone.passes_s / alone.compile_s:.2%} in our passes)" if alone.passes_s else ""
            memory = f", peak memory {alone.peak_mb:.0f} MiB" if alone.peak_mb is not None else ""
            print(f"  {form:10s} {kind:10s} compile {alone.compile_s:.1f} s{share}{memory}")
    for note in result.notes():
        print(f"  {note}", flush=True)


def _words(size: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in size.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="every layers, width and length of the grid, no memory")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of step; default all")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--width", type=int, nargs="+", help=f"multiples of {HEAD}")
    parser.add_argument("--length", type=int, nargs="+")
    parser.add_argument("--batch", type=int, help=f"default 2; in the grid, {TOKENS} tokens together")
    parser.add_argument("--blocks", type=int, default=8, help="at most; a model of fewer layers has as many as these")
    parser.add_argument("--schedule", default="auto", help="auto, per_read or two_phase")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the timed rounds of a size")
    parser.add_argument("--rounds", type=int, default=200, help="at most, of every kind of step")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if any(width < HEAD or width % HEAD for width in options.width or []):
        parser.error(f"--width takes multiples of {HEAD}, the width of a head")
    run(options)


if __name__ == "__main__":
    main()
