"""Fill the caches on disk before anything is timed, in many processes at once.

A compiled model takes a minute or two the first time, and a few seconds once Inductor's caches have it: each is
compiled by a process of its own. Some peers' autotuners try dozens of configurations per kernel and number of sources,
each of which compiles for a second or more; every process takes a part of each tuner's list. More than ``limit``
configurations of one kernel are thinned out evenly, here and in the benchmark, which says so in its results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from _peers import CUDA_PEERS, reason, without_folders

# Package of each peer's tuners.
PACKAGES = {
    "fla fused_attnres": "fla.ops.attnres",
    "fast-attnres": "attnres",
    "liger attn_res": "liger_kernel.ops.attn_res",
    "flash-attn-res": "flash_attn_res",
}

_FAILED = "failed:"


def tuners(package: str) -> dict[str, Any]:
    """The autotuners in the loaded modules of ``package``, by name."""
    from triton.runtime import Autotuner

    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            found |= {key: value for key, value in vars(module).items() if isinstance(value, Autotuner)}
    return found


def thin_out(limit: int) -> dict[str, str]:
    """Leave every tuner of the loaded peers at most ``limit`` configurations; says what was left of how many."""
    report = {}
    for package in PACKAGES.values():
        for name, tuner in tuners(package).items():
            total = len(tuner.configs)
            stride = -(-total // limit)
            if stride > 1:
                tuner.configs = list(tuner.configs)[::stride]
                report[f"{package}: {name}"] = f"{len(tuner.configs)} of {total} configurations"
    return report


def load_peers() -> None:
    """Import every peer that can be; those that define their kernels when first called too."""
    for _, load in CUDA_PEERS.values():
        with contextlib.suppress(Exception):
            load()
    with contextlib.suppress(Exception):
        __import__("attnres._kernels.fla_full_sources")


Running = dict[str, tuple[float, subprocess.Popen[str], IO[str]]]


def start_compiling(models: list[str], arguments: list[str]) -> Running:
    """Start a process for every model, which compiles it as ``gpu.py`` with ``arguments`` will."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    command = [sys.executable, str(Path(__file__).parent / "gpu.py"), *arguments, "--compile"]
    running: Running = {}
    for model in models:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by wait_for)
        process = subprocess.Popen([*command, model], stdout=log, stderr=log, text=True, env=environment)
        running[model] = time.monotonic(), process, log
    return running


def wait_for(running: Running, seconds: float) -> dict[str, str]:
    """Wait for what :func:`start_compiling` started; processes not done ``seconds`` after that are ended."""
    report = {}
    for model, (start, process, log) in running.items():
        try:
            process.wait(max(1.0, seconds - (time.monotonic() - start)))
            log.seek(0)
            last = [without_folders(line) for line in log.read().splitlines() if line.strip()][-1:]
            report[model] = f"{'done' if process.returncode == 0 else 'failed'}: {''.join(last)[:240]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            report[model] = "not done in time"
        log.close()
    return report


def fill_cache(seconds: float, limit: int, shapes: list[tuple[int, int, int, int]], processes: int) -> dict[str, Any]:
    """Run the peers' autotuners; ``shapes`` are (batch, length, width, sources). Those not done in time are ended."""
    parts = max(1, min(processes, (os.cpu_count() or 2) - 2))
    text = [",".join(map(str, shape)) for shape in shapes]
    command = [sys.executable, __file__, "--limit", str(limit), "--shapes", *text, "--part"]
    start = time.monotonic()
    result: dict[str, Any] = {"processes": parts, "not_done_in_time": 0, "failed": []}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(parts)]
        running = [
            subprocess.Popen([*command, f"{part}/{parts}"], stdout=log, stderr=log) for part, log in enumerate(logs)
        ]
        for process, log in zip(running, logs, strict=True):
            try:
                process.wait(max(0.0, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                result["not_done_in_time"] += 1
            log.seek(0)
            lines = log.read().splitlines()
            if process.returncode > 0 or any(line.startswith(_FAILED) for line in lines):
                result["failed"].append(without_folders(lines[-1]) if lines else f"exit {process.returncode}")
    return result | {"seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--part", required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    options = parser.parse_args()
    import torch
    from _gpu_op import Inputs, Shape

    part, parts = map(int, options.part.split("/"))
    load_peers()
    thin_out(options.limit)
    for package in PACKAGES.values():
        for tuner in tuners(package).values():
            own = list(tuner.configs)
            tuner.configs = own[part::parts] or [own[part % len(own)]]
    for shape in options.shapes:
        batch, length, width, n = map(int, shape.split(","))
        inputs = Inputs(Shape(batch, length, width, n), "cuda")
        for name, (_, load) in CUDA_PEERS.items():
            if not tuners(PACKAGES[name]):
                continue
            try:
                inputs.calls(load())["forward+backward"]()
            except Exception as error:
                print(_FAILED, name, reason(error))
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
