"""Step times of both forms, in one process and taking turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from attnres_rewrite import _compat
from attnres_rewrite.bench.forms import Bench, MakeModel, make_bench
from attnres_rewrite.bench.results import BenchResult, StepTimes, environment
from attnres_rewrite.bench.settings import FEWEST_ROUNDS, FORMS, BenchSettings, Form, Kind
from attnres_rewrite.bench.workload import CannotDecode, Step
from attnres_rewrite.errors import AttnResError


def compare(
    make_model: MakeModel,
    settings: BenchSettings | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Time the rewritten form of a model against the plain one, both compiled.

    What ``torch.compile`` made in this process before is forgotten. On a CPU the process keeps the memory that it frees
    from then on, as it does with CUDA's caching allocator: otherwise the page faults of large results are a part of
    every step. How its threads wait is for ``OMP_WAIT_POLICY`` to say, before Python starts.

    Args:
        make_model: Makes the plain model, on any device, and may return example inputs with it, as
            :func:`attnres_rewrite.rewrite` takes them: ``(model, example_inputs)``. It is called twice.
        settings: What to measure.
        progress: Told what is being done, as it begins.

    Returns:
        Times of every kind of step, and why there are none of a kind that was wanted.

    Raises:
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
        ValueError: There is no such device.
    """
    settings = settings or BenchSettings()
    device = settings.resolve_device()
    kept = device.type == "cpu" and keep_freed_memory()
    with cpu_threads(settings.threads):
        progress("Making the model twice and rewriting one of them")
        bench = make_bench(make_model, settings, FORMS)
        times, skipped = {}, {}
        for kind in settings.kinds:
            progress(f"Compiling both forms and timing {kind} steps")
            try:
                times[kind] = _time(bench, kind)
            except CannotDecode as reason:
                skipped[kind] = str(reason)
        return BenchResult(
            model=type(bench.plain).__name__,
            parameters={form: sum(p.numel() for p in model.parameters()) for form, model in bench.models.items()},
            sizes=bench.workload.sizes,
            cached=bench.cached if "decode" in times else None,
            device=str(device),
            settings=settings,
            times=times,
            skipped=skipped,
            environment={**environment(device), "freed_memory_kept": kept},
            blocks=bench.blocks,
        )


def _time(bench: Bench, kind: Kind) -> StepTimes:
    # Both forms run the same functions of a library, and Dynamo keeps so many graphs of a function only: the form that
    # comes to the limit would run as it is written, and be compared so.
    torch.compiler.reset()
    settings, steps = bench.settings, bench.steps(kind)
    try:
        warm_up(steps, settings.warmup)
    except AttnResError as error:
        if kind != "decode":
            raise
        # Whoever wants the other kinds, which this model can do, should have them.
        raise CannotDecode(f"the rewritten form cannot: {error}") from error
    seconds = None if settings.seconds is None else settings.seconds / len(settings.kinds)
    return interleave(steps, bench.device, rounds=settings.rounds, seconds=seconds)


def warm_up(steps: Mapping[Form, Step], rounds: int) -> None:
    """Run ``rounds`` rounds, of which the first compiles and some allocate what stays."""
    for _ in range(rounds):
        for step in steps.values():
            step()


def interleave(
    steps: Mapping[Form, Step], device: torch.device, *, rounds: int, seconds: float | None = None
) -> StepTimes:
    """Time rounds of one step of every form.

    Args:
        steps: The steps, warmed up.
        device: Where they run.
        rounds: Most rounds.
        seconds: Time after which no round begins, once there were enough of them; ``None``: there is no such time.
    """
    times: dict[Form, list[float]] = {form: [] for form in steps}
    graphs = _compat.graphs_compiled()
    gc.collect()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and seconds is not None and time.perf_counter() - begin > seconds:
            break
        # The order alternates, so that neither form always finds the caches as the other left them.
        for form in sorted(steps, reverse=bool(done % 2)):
            times[form].append(timed(steps[form], device))
    return StepTimes(tuple(times["plain"]), tuple(times["rewritten"]), _compat.graphs_compiled() - graphs)


def timed(step: Step, device: torch.device) -> float:
    """Seconds that one call takes, until the device is idle again."""
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch use this many CPU threads within the context; ``None``: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> bool:
    """Ask glibc not to return freed memory to the system; False where there is no glibc."""
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))
