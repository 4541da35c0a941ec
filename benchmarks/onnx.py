"""ONNX Runtime: a rewritten model against the plain one, and the ways to write a site.

A Llama of 12 layers and width 512, plain and rewritten with eight blocks (random queries), all exported with a key-
value cache by the same exporter. One step each in turn, so that what disturbs the machine disturbs all; the ratio of a
round is taken within it, and the median of the rounds is reported, with the 10th and 90th percentile. Threads do not
spin between steps: the thread of one session would take the core of the next.

    python benchmarks/onnx.py [--layers 12] [--width 512] [--prompt 256] [--threads 2] [--quick] [--out FILE]
    python benchmarks/onnx.py --provider cuda --out FILE   # on a machine with a GPU, and onnxruntime-gpu

The file has for each of ``prefill``, ``decode``, ``load`` and ``file size`` one row for ``plain``, ``rewritten`` (as
``export_onnx`` writes it), ``whole`` (sites by themselves) and, on the CPU, ``shared, kernel`` and ``kernel`` (these
two with ``attnres_rewrite.onnx.register``); the first two also, on the CPU, for the formulations of
``onnx_formulations.py``.
``ratio`` is to ``plain``, ``difference_from_rewritten`` that of the logits, and ``load_average`` that of the machine
before and after.
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
from onnx_formulations import FORMULATIONS, rewrite_functions
from onnxscript import ir
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite

RESULTS = Path(__file__).parent / "results" / "onnx.json"
VOCABULARY, HEAD_WIDTH = 8192, 64
FORMS: dict[str, Literal["shared", "whole"]] = {"rewritten": "shared", "whole": "whole"}
# The same files, with kernels.
KERNELS = {"shared, kernel": "rewritten", "kernel": "whole"}
TARGETS = {"prefill": 1.05, "decode": 1.03, "file size": 1.05, "load": 1.10}
KERNEL_TARGETS = {"prefill": 1.02, "decode": 1.02, "file size": 1.05, "load": 1.05}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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


def export_all(folder: Path, layers: int, width: int, others: bool) -> dict[str, Path]:
    """The plain model, the rewritten one in both forms, and, if ``others``, with every other way to write a site."""
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, 8))}
    files = {name: folder / f"{name}.onnx" for name in ("plain", *FORMS)}
    export_plain(make_model(layers, width), inputs, files["plain"], use_cache=True)
    model = attnres_rewrite.rewrite(make_model(layers, width), blocks=8, backend="eager")
    torch.manual_seed(1)
    for parameter_name, parameter in attnres_rewrite.attnres_parameters(model):
        if parameter_name.endswith("query"):
            torch.nn.init.normal_(parameter, std=0.5)
    for name, sites in FORMS.items():
        result = attnres_rewrite.export_onnx(model, files[name], inputs, use_cache=True, sites=sites)
        print(f"{name}: {result.sites} sites, {result.max_difference:.1e} from PyTorch")
    for index, name in enumerate(FORMULATIONS if others else ()):
        files[name] = folder / f"formulation_{index}.onnx"
        other = ir.load(files["whole"])
        rewrite_functions(other, FORMULATIONS[name])
        ir.save(other, files[name])
    if others:
        files |= {name: files[same] for name, same in KERNELS.items()}
    return files


def open_session(path: Path, threads: int, provider: str, kernel: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if kernel:
        attnres_rewrite.onnx.register(options, path)
    wanted = PROVIDERS[provider]
    # Everybody has the CPU's for what the one asked for lacks.
    providers = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != wanted:
        raise SystemExit(f"ONNX Runtime runs the model with {session.get_providers()}, not with the {wanted} asked for")
    return session


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
    parser.add_argument("--provider", choices=tuple(PROVIDERS), default="cpu", help="the execution provider")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no file of results but with --out")
    parser.add_argument("--out", type=Path, help=f"the file of results, by default {RESULTS.name}")
    settings = parser.parse_args()
    if settings.provider != "cpu" and settings.out is None and not settings.quick:
        parser.error(f"{RESULTS.name} is of the CPU: pass --out")
    load_average = [os.getloadavg()[0]]
    torch.set_num_threads(settings.threads)
    rounds = (3, 10, 2) if settings.quick else (40, 300, 40)
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(Path(folder), settings.layers, settings.width, settings.provider == "cpu")
        results: dict[str, Any] = {}
        for kind, tokens, past, count in (("prefill", settings.prompt, 0, rounds[0]), ("decode", 1, 256, rounds[1])):
            sessions = {
                name: open_session(path, settings.threads, settings.provider, name in KERNELS)
                for name, path in files.items()
            }
            inputs = {name: feed(session, tokens, past) for name, session in sessions.items()}
            differences = check(sessions, inputs)
            steps = {name: _step(sessions[name], inputs[name]) for name in files}
            results[kind] = time_rounds(steps, count)
            for name, difference in differences.items():
                results[kind][name]["difference_from_rewritten"] = difference
            del sessions, steps
        kept = [name for name in files if name in ("plain", *FORMS, *KERNELS)]
        loads = {name: _loader(files[name], settings.threads, settings.provider, name in KERNELS) for name in kept}
        results["load"] = time_rounds(loads, rounds[2])
        sizes = {name: files[name].stat().st_size for name in kept}
        results["file size"] = {name: {"bytes": size, "ratio": size / sizes["plain"]} for name, size in sizes.items()}
    targets = {name: KERNEL_TARGETS if name in KERNELS else TARGETS for name in kept if name != "plain"}
    reached = {
        name: {kind: results[kind][name]["ratio"] <= target for kind, target in of_one.items()}
        for name, of_one in targets.items()
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


def _loader(path: Path, threads: int, provider: str, kernel: bool) -> Callable[[], Any]:
    return lambda: open_session(path, threads, provider, kernel)


if __name__ == "__main__":
    main()
