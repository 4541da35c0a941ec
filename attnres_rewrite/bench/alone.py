"""Compile time and memory of one form: in a process of its own, with a cold cache."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from attnres_rewrite.bench.forms import Bench, MakeModel, make_bench, timed_passes
from attnres_rewrite.bench.results import MIB, Alone, FormAlone
from attnres_rewrite.bench.settings import FORMS, BenchSettings, Form, Kind
from attnres_rewrite.bench.timing import cpu_threads, timed
from attnres_rewrite.bench.workload import Step
from attnres_rewrite.errors import AttnResError

# Later calls, whose median the first one is compared with.
LATER = 3


def measure_alone(make_model: MakeModel, form: Form, settings: BenchSettings) -> FormAlone:
    """Compile time and memory of one form, in this process.

    For a process of its own and a cache that is empty; :func:`run_alone` starts one. Decode steps are left out.

    Args:
        make_model: Makes the plain model, as for :func:`attnres_rewrite.bench.compare`.
        form: Which form.
        settings: What to measure.

    Raises:
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
    """
    with cpu_threads(settings.threads):
        _start_compiler(settings)
        bench = make_bench(make_model, settings, (form,))
        kinds = [kind for kind in settings.kinds if kind != "decode"]
        return FormAlone(bench.rewrite_s, {kind: _measure(bench, kind) for kind in kinds})


def _start_compiler(settings: BenchSettings) -> None:
    """Compile next to nothing, so that what happens once in a process counts for neither form."""
    compiled = torch.compile(lambda x: x.sin() + 1, backend=settings.backend)
    compiled(torch.zeros(64, device=settings.resolve_device()))


def _measure(bench: Bench, kind: Kind) -> Alone:
    (step,) = bench.steps(kind).values()
    with timed_passes() as passes:
        first = timed(step, bench.device)
    later = statistics.median(timed(step, bench.device) for _ in range(LATER))
    before, peak = peak_memory(step, bench.device)
    return Alone(first - later, sum(passes), before, peak)


def peak_memory(step: Step, device: torch.device) -> tuple[float | None, float | None]:
    """Memory in use before ``step``, and the most that it has in use beyond that, in MiB.

    On an accelerator what PyTorch allocated there; on a CPU the resident set of this process, which only Linux
    measures for a stretch of time: elsewhere both are ``None``.
    """
    gc.collect()
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        timed(step, device)
        return before / MIB, (torch.accelerator.max_memory_allocated(device) - before) / MIB
    _return_freed_memory()
    try:
        # Sets the high-water mark of the resident set to what it is now.
        Path("/proc/self/clear_refs").write_text("5")
        resident = _resident("VmHWM")
        step()
        return resident, _resident("VmHWM") - resident
    except OSError:
        return None, None


def _resident(field: str) -> float:
    """A field of the status of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _return_freed_memory() -> None:
    """Ask glibc, where it is there, to return to the system what is free."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def run_alone(name: str, settings: BenchSettings) -> dict[Form, FormAlone]:
    """:func:`measure_alone` of both forms, one after the other in new processes with empty caches.

    Args:
        name: The model as the command line names it: a folder with a ``config.json``, or ``module:factory``.
        settings: What to measure.

    Raises:
        AttnResError: A process failed; the message is its last line.
    """
    return {form: _run(name, form, settings) for form in FORMS}


def _run(name: str, form: Form, settings: BenchSettings) -> FormAlone:
    command = [sys.executable, "-m", "attnres_rewrite.bench", name, form, settings.to_json()]
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AttnResError(
            f"measuring the {form} form of {name} in a process of its own failed with status {done.returncode}: {last}"
        )
    return FormAlone.from_dict(json.loads(done.stdout.splitlines()[-1]))


def main(name: str, form: Form, settings: str) -> None:
    """Measure one form of the model ``name`` in this process and print the figures as a line of JSON."""
    from attnres_rewrite.named_models import load_model

    wanted = BenchSettings.from_json(settings)
    device = str(wanted.resolve_device())
    figures = measure_alone(lambda: load_model(name, device), form, wanted)
    print(json.dumps(dataclasses.asdict(figures)))
