"""Block AttnRes in a whole model, against the same model compiled without it.

A Llama-architecture model runs plain and rewritten. Compile time (cold cache) and peak memory are
measured in a process of their own for each; step times of both are interleaved in one process, and the
ratio of the medians is what counts.

    python benchmarks/end_to_end.py [--layers 12] [--width 512] [--length 256] [--batch 2] [--blocks 8]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
VOCABULARY = 8192
FORMS = ("plain", "attnres")


def make_model(form: str, options: argparse.Namespace) -> nn.Module:
    """The model, on its device: compiled plain, or rewritten with random queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))
    if form == "plain":
        model.compile()
        return model
    attnres_rewrite.rewrite(model, blocks=options.blocks)
    for name, parameter in attnres_rewrite.attnres_parameters(model):
        if name.endswith("query"):
            nn.init.normal_(parameter, std=options.width**-0.5)
    return model


def make_steps(model: nn.Module, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A training step (forward, backward, AdamW) and an inference step of ``model``."""
    tokens = torch.randint(VOCABULARY, (options.batch, options.length), device=options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train() -> None:
        model.train()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer() -> None:
        model.eval()
        model(input_ids=tokens)

    return {"training": train, "inference": infer}


def synchronise(device: str) -> None:
    """Wait until everything that was launched has run."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds that one call takes."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def peak_memory(step: Callable[[], None], device: str) -> float:
    """Peak memory in MB while ``step`` runs: of the device, or the resident set of this process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        timed(step, device)
        return torch.cuda.max_memory_allocated() / 2**20
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # resets the high-water mark of the resident set
    step()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_alone(form: str, options: argparse.Namespace) -> dict[str, float]:
    """Compile times in seconds and peak memory in MB of one form; for a process of its own."""
    steps = make_steps(make_model(form, options), options)
    measured = {}
    for name, step in steps.items():
        first = timed(step, options.device)
        again = statistics.median(timed(step, options.device) for _ in range(3))
        measured[f"{name}_compile_s"] = first - again
        measured[f"{name}_peak_mb"] = peak_memory(step, options.device)
    return measured


def run_alone(form: str) -> dict[str, float]:
    """:func:`measure_alone` in a new process with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", form]
        output = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def interleaved(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median step times of both forms, a step of one after a step of the other, and their ratio."""
    steps = {form: make_steps(make_model(form, options), options) for form in FORMS}
    results = {}
    for name in ("training", "inference"):
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for round_number in range(options.rounds + options.warmup):
            # The order alternates, so that neither form always runs on the other's warm cache.
            for form in FORMS if round_number % 2 else FORMS[::-1]:
                seconds = timed(steps[form][name], options.device)
                if round_number >= options.warmup:
                    times[form].append(seconds)
        medians = {form: statistics.median(values) for form, values in times.items()}
        pairs = [a / p for a, p in zip(times["attnres"], times["plain"], strict=True)]
        results[name] = {
            "plain_ms": medians["plain"] * 1e3,
            "attnres_ms": medians["attnres"] * 1e3,
            "ratio": medians["attnres"] / medians["plain"],
            "median_of_pair_ratios": statistics.median(pairs),
        }
    return results


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--alone", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure_alone(options.alone, options)))
        return
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("alone", "out")},
        "alone": {form: run_alone(form) for form in FORMS},
        "interleaved": interleaved(options),
    }
    for name, row in results["interleaved"].items():
        times = f"plain {row['plain_ms']:8.1f} ms  attnres {row['attnres_ms']:8.1f} ms"
        print(f"{name:10s} {times}  ratio {row['ratio']:.3f}")
    for key in results["alone"]["plain"]:
        plain, attnres = (results["alone"][form][key] for form in FORMS)
        print(f"{key:22s} plain {plain:8.1f}  attnres {attnres:8.1f}  ratio {attnres / plain:.3f}")
    write_results(options.out, results)


if __name__ == "__main__":
    main()
