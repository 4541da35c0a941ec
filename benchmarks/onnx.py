"""ONNX Runtime on the CPU: a rewritten model against the plain one, and the ways to write a site.

A Llama of 12 layers and width 512, plain and rewritten with eight blocks (random queries) in either schedule, all
exported with a key-value cache by the same exporter. One step each in turn, so that what disturbs the machine disturbs
all; the ratio of a round is taken within it, and the median of the rounds is reported, with the 10th and 90th
percentile. Threads do not spin between steps: the thread of one session would take the core of the next.

    python benchmarks/onnx.py [--layers 12] [--width 512] [--prompt 256] [--threads 2] [--quick] [--out FILE]

The file has for each of ``prefill``, ``decode``, ``load`` and ``file size`` one row for ``plain``, ``rewritten`` (sites
by themselves), ``kernel`` (the same with ``attnres_rewrite.onnx.register``) and ``two_phase`` (the sites of a block
share the complete blocks); the first two also for the formulations of ``onnx_formulations.py``. ``ratio`` is to
``plain``, ``difference_from_rewritten`` that of the logits, and ``load_average`` that of the machine before and after.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# This file has the name of a package that is imported below, so what is installed comes before this folder.
sys.path.append(sys.path.pop(0))

import numpy
import onnxruntime
import torch
from _environment import environment, write_results
from _plain_onnx import export_plain
from onnx_formulations import FORMULATIONS, TWO_PHASE, rewrite_functions, rewrite_phases
from onnxscript import ir
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite

RESULTS = Path(__file__).parent / "results" / "onnx.json"
VOCABULARY, HEAD_WIDTH = 8192, 64
SCHEDULES: dict[str, Literal["per_read", "two_phase"]] = {"rewritten": "per_read", "two_phase": "two_phase"}
TARGETS = {"prefill": 1.02, "decode": 1.05, "file size": 1.05, "load": 1.05}
KERNEL = "kernel"
KERNEL_TARGETS = {**TARGETS, "decode": 1.02}


def make_model(layers: int, width: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def export_all(folder: Path, layers: int, width: int) -> dict[str, Path]:
    """The plain model, the rewritten one in both schedules, and these with every other way to write a site."""
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, 8))}
    files = {name: folder / f"{name}.onnx" for name in ("plain", *SCHEDULES)}
    export_plain(make_model(layers, width), inputs, files["plain"], use_cache=True)
    for name, schedule in SCHEDULES.items():
        config = attnres_rewrite.AttnResConfig(blocks=8, schedule=schedule)
        model = attnres_rewrite.rewrite(make_model(layers, width), config=config, backend="eager")
        torch.manual_seed(1)
        for parameter_name, parameter in attnres_rewrite.attnres_parameters(model):
            if parameter_name.endswith("query"):
                torch.nn.init.normal_(parameter, std=0.5)
        result = attnres_rewrite.export_onnx(model, files[name], inputs, use_cache=True, tolerance=1e-3)
        print(f"{name}: {result.sites} sites, {result.max_difference:.1e} from PyTorch")
    for index, name in enumerate([*FORMULATIONS, *TWO_PHASE]):
        files[name] = folder / f"formulation_{index}.onnx"
        other = ir.load(files["two_phase" if name in TWO_PHASE else "rewritten"])
        if name in TWO_PHASE:
            rewrite_phases(other, *TWO_PHASE[name])
        else:
            rewrite_functions(other, FORMULATIONS[name])
        ir.save(other, files[name])
    files[KERNEL] = files["rewritten"]
    return files


def open_session(path: Path, threads: int, kernel: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if kernel:
        attnres_rewrite.onnx.register(options, path)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(session: Any, tokens: int, past: int) -> dict[str, Any]:
    generator = numpy.random.default_rng(0)
    values: dict[str, Any] = {
        "input_ids": generator.integers(1, VOCABULARY, (1, tokens)),
        "position_ids": numpy.arange(past, past + tokens)[None],
    }
    for given in session.get_inputs():
        if given.name.startswith("past"):
            heads, width = given.shape[1], given.shape[3]
            values[given.name] = generator.standard_normal((1, heads, past, width)).astype(numpy.float32)
    return values


def time_rounds(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median time of each step in milliseconds, and its ratio to the first one of the same round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    table = {}
    for name, measured in times.items():
        ratios = sorted(a / b for a, b in zip(measured, base, strict=True))
        table[name] = {
            "milliseconds": round(1e3 * statistics.median(measured), 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_10th": round(ratios[len(ratios) // 10], 4),
            "ratio_90th": round(ratios[9 * len(ratios) // 10], 4),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no file of results but with --out")
    parser.add_argument("--out", type=Path, help=f"the file of results, by default {RESULTS.name}")
    settings = parser.parse_args()
    load_average = [os.getloadavg()[0]]
    torch.set_num_threads(settings.threads)
    rounds = (3, 10, 2) if settings.quick else (30, 300, 12)
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(Path(folder), settings.layers, settings.width)
        results: dict[str, Any] = {}
        for kind, tokens, past, count in (("prefill", settings.prompt, 0, rounds[0]), ("decode", 1, 256, rounds[1])):
            sessions = {name: open_session(path, settings.threads, name == KERNEL) for name, path in files.items()}
            inputs = {name: feed(session, tokens, past) for name, session in sessions.items()}
            differences = check(sessions, inputs)
            steps = {name: _step(sessions[name], inputs[name]) for name in files}
            results[kind] = time_rounds(steps, count)
            for name, difference in differences.items():
                results[kind][name]["difference_from_rewritten"] = difference
            del sessions, steps
        loads = {name: _loader(files[name], settings.threads, name == KERNEL) for name in ("plain", *SCHEDULES, KERNEL)}
        results["load"] = time_rounds(loads, rounds[2])
        sizes = {name: files[name].stat().st_size for name in ("plain", *SCHEDULES, KERNEL)}
        results["file size"] = {name: {"bytes": size, "ratio": size / sizes["plain"]} for name, size in sizes.items()}
    reached = {
        name: {kind: results[kind][name]["ratio"] <= target for kind, target in targets.items()}
        for name, targets in {**dict.fromkeys(SCHEDULES, TARGETS), KERNEL: KERNEL_TARGETS}.items()
    }
    for kind, rows in results.items():
        for name, row in rows.items():
            print(f"{kind:10s} {name:34s} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print("targets reached:", reached)
    out = settings.out or (None if settings.quick else RESULTS)
    if out is not None:
        load_average.append(os.getloadavg()[0])
        given = {name: value for name, value in vars(settings).items() if name != "out"}
        found = {"settings": given, "load_average": load_average, "results": results, "targets": TARGETS}
        found["kernel_targets"] = KERNEL_TARGETS
        write_results(out, {**environment(), **found})


def check(sessions: dict[str, Any], inputs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest difference of the logits from those of the rewritten model, relative to the largest of them."""
    logits = {name: session.run(["logits"], inputs[name])[0] for name, session in sessions.items()}
    reference = logits["rewritten"]
    differences = {name: float(abs(value - reference).max() / abs(reference).max()) for name, value in logits.items()}
    for name, difference in differences.items():
        # The plain model is another function; the others are the same one, summed in another order.
        assert (difference > 1e-2) if name == "plain" else (difference < 1e-2), (name, difference)
    return {name: difference for name, difference in differences.items() if name not in ("plain", "rewritten")}


def _step(session: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(["logits"], inputs)


def _loader(path: Path, threads: int, kernel: bool) -> Callable[[], Any]:
    return lambda: open_session(path, threads, kernel)


if __name__ == "__main__":
    main()
