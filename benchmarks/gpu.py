"""Everything that needs a GPU, in one command and within a budget of time.

    python benchmarks/gpu.py --out DIR [--wheels DIR] [--seconds 540] [--sections op,step,decode]

Sections, in order of importance: ``op`` (one read against fused kernels of peers, cold L2, CUDA graphs), ``step`` (a
training step of a Llama, plain and rewritten in both schedules, and with layers compiled once), ``wide`` (the same of a
width of 4096), ``decode`` (one token, static cache), ``published`` (one read of the shape that others have published
times for), ``phases`` (phase one, against Inductor's of the same equations), ``peers`` (the training step with a peer's
kernel at every site), ``registers`` (one read at several widths, looped or with its sources in registers), ``kernels``
(how many kernels one site is, and their code), ``tests`` (the GPU tests), ``big`` (one read of large sources) and
``fp32`` (one read in float32). Before the first of them everything is compiled once, in many processes at a time, so
that what is timed finds it in the caches on disk. Results are in ``DIR/gpu.json`` after every row, so a run that is cut
off loses nothing. What cannot run is skipped with the reason. On CPU (``--device cpu --quick``) the same code runs on
small sizes, to see that it does.

``--wheels`` names a folder of pure Python wheels (fla-core, liger-kernel, flash-attn-res, fast-attnres) for machines
that nothing can be installed on; they are unpacked to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed.
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from _environment import environment, unpack_wheels  # noqa: E402
from _gpu_op import (  # noqa: E402
    big_shape,
    in_registers_or_looped,
    kernels_of_one_site,
    measure_shapes,
    published_shape,
    small_shapes,
)
from _gpu_phases import measure_phases  # noqa: E402
from _gpu_timing import Budget, Device, OutOfTime, Record  # noqa: E402
from _gpu_warm import fill_cache, load_peers, start_compiling, thin_out, wait_for  # noqa: E402
from _peers import CUDA_PEERS, reason, version, without_folders  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SECTIONS = (
    "op",
    "step",
    "wide",
    "decode",
    "published",
    "phases",
    "peers",
    "registers",
    "kernels",
    "tests",
    "big",
    "fp32",
)
SOURCES = (3, 5, 9)


def warm_up(device: Device, record: Record, budget: Budget, options: argparse.Namespace) -> None:
    """Compile the models, and what the peers' autotuners try, before anything is timed."""
    wanted = set(options.sections)
    if not device.cuda or options.resume:
        return
    deadline = min(options.warm_seconds, budget.left() / 3)
    running = start_compiling(_models(wanted), sys.argv[1:]) if wanted & {"step", "wide", "peers", "decode"} else {}
    if wanted & {"op", "big", "peers", "fp32", "published"}:
        load_peers()
        record["autotuning"] = {"configurations": thin_out(options.peer_configurations)}
        shapes = _tuned_shapes(wanted)
        record["autotuning"] |= fill_cache(deadline, options.peer_configurations, shapes, 6 if running else 14)
    record["warm_up"] = wait_for(running, deadline)


def _models(wanted: set[str]) -> list[str]:
    """What is compiled whole, as section and name."""
    from _gpu_model import EINSUM, GRAPH_PEERS, LAYERS_ONCE, OURS, PER_READ, PLAIN

    names = {
        "wide": (OURS, PER_READ, PLAIN),
        "step": (OURS, PER_READ, PLAIN, LAYERS_ONCE),
        "decode": (OURS, PLAIN),
        "peers": (*GRAPH_PEERS, EINSUM),
    }
    return [f"{section}:{name}" for section in names if section in wanted for name in names[section]]


def _tuned_shapes(wanted: set[str]) -> list[tuple[int, int, int, int]]:
    """Batch, length, width and sources, the most important ones first."""
    small = [(2, 1024, 1024, n) for n in SOURCES[::-1]] if wanted & {"op", "peers", "fp32"} else []
    if "published" in wanted:
        small.append((1, 8192, 7168, 9))
    if "big" in wanted:
        # Tuners tell widths and numbers of sources apart, but not more rows than these.
        small.append((1, 8192, 2048, 9))
    others = [n for n in range(8, 1, -1) if n not in SOURCES] if "peers" in wanted else []
    return [*small, *((2, 1024, 1024, n) for n in others)]


def compile_model(what: str, options: argparse.Namespace) -> None:
    """Compile one of :func:`_models` and run it once, in this process."""
    from _gpu_model import Decoding, TrainingStep, larger

    section, _, name = what.partition(":")
    device = Device(options.device)
    if section == "decode":
        seconds = Decoding(name, device, options).compile_s
    else:
        step = TrainingStep(name, device, larger(options) if section == "wide" else options, only_compile=True)
        seconds = step.row["first_step_s"]
    print(f"first step in {seconds} s")


def run_tests(record: Record, budget: Budget, options: argparse.Namespace) -> None:
    """The GPU tests in a process of their own, in the time that is left."""
    seconds = min(90.0, budget.left() - 5)
    if options.device == "cpu" and options.quick:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "--disable-warnings", "--collect-only"]
    else:
        budget.need(25)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "--disable-warnings"]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipe) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 1))
            code: int | str = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            code = f"not done in {seconds:.0f} s"
    tail = [without_folders(line) for line in output.splitlines()[-12:]]
    record["tests"] = {"exit": code, "tail": tail}
    print("\n".join(["", *tail]))


def sections(
    device: Device, record: Record, budget: Budget, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    quick, rounds = options.quick, options.rounds
    op_arguments = (device, record, budget, options)
    steps: dict[str, Any] = {}

    def step(*names: str) -> None:
        from _gpu_model import measure_steps

        measure_steps("step", list(names), steps, device, record, budget, rounds, options)

    def decode() -> None:
        from _gpu_model import OURS, measure_decoding

        measure_decoding([OURS], device, record, budget, options)

    def peers() -> None:
        from _gpu_model import EINSUM, GRAPH_PEERS

        step(*GRAPH_PEERS, EINSUM)

    def ours() -> None:
        from _gpu_model import LAYERS_ONCE, OURS, PER_READ

        step(OURS, PER_READ, LAYERS_ONCE)

    def wide() -> None:
        from _gpu_model import OURS, PER_READ, larger, measure_steps

        measure_steps("wide", [OURS, PER_READ], {}, device, record, budget, rounds, larger(options))

    bf16 = small_shapes(quick, torch.bfloat16, SOURCES)
    return {
        "op": lambda: measure_shapes("op", bf16, *op_arguments),
        "step": ours,
        "wide": wide,
        "decode": decode,
        "published": lambda: measure_shapes("published", [published_shape(quick)], *op_arguments),
        "phases": lambda: measure_phases(*op_arguments),
        "registers": lambda: in_registers_or_looped(*op_arguments),
        "kernels": lambda: kernels_of_one_site(device, record, options.out, options),
        "big": lambda: measure_shapes("big", [big_shape(quick)], *op_arguments),
        "peers": peers,
        "fp32": lambda: measure_shapes("fp32", small_shapes(quick, torch.float32, (9,)), *op_arguments),
        "tests": lambda: run_tests(record, budget, options),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json and the kernels' code")
    parser.add_argument("--wheels", type=Path, help="folder of pure Python wheels of peers")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=50, help="of one read")
    parser.add_argument("--rounds", type=int, default=30, help="of a training step")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--peer-configurations", type=int, default=8, help="that a peer's autotuner may try")
    parser.add_argument("--warm-seconds", type=float, default=130, help="to compile before anything is timed, at most")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="add to the gpu.json that is there")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; sections are {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (--device cpu --quick runs the same code on small sizes)")
    if options.quick:
        options.repeats, options.rounds = 5, 3
        options.layers, options.width, options.batch, options.length, options.blocks = 4, 64, 1, 32, 2
    return options


def main() -> None:
    options = parse()
    budget = Budget(options.seconds)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.wheels:
        unpack_wheels(options.wheels)
    # Variants of one model share its code, for which Dynamo counts recompilations together.
    torch._dynamo.config.recompile_limit = 64
    if options.compile:
        compile_model(options.compile, options)
        return
    device = Device(options.device)
    kept_out = ("out", "wheels", "resume", "compile")
    versions = {name: version(name) for name in ("triton", "transformers", *(d for d, _ in CUDA_PEERS.values()))}
    start = {
        "environment": environment(),
        "settings": {key: value for key, value in vars(options).items() if key not in kept_out},
        "versions": versions,
        "sections": {},
    }
    path = options.out / "gpu.json"
    record = Record(path, json.loads(path.read_text()) if options.resume else start)
    table = {"warm_up": lambda: warm_up(device, record, budget, options)}
    table |= {name: run for name, run in sections(device, record, budget, options).items() if name in options.sections}
    for name, run in table.items():
        before = budget.left()
        print(f"\n== {name}, {before:.0f} s left", flush=True)
        status = "done"
        try:
            budget.need(1)
            run()
        except OutOfTime as error:
            status = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            status = f"failed: {reason(error)} ({Path(place.filename).name}:{place.lineno})"
        record["sections"][name] = {"status": status, "seconds": round(before - budget.left(), 1)}
        record.write()
        print(f"== {name}: {status}", flush=True)
        if device.broken():
            run_rest([later for later in options.sections if later not in record["sections"]], budget)
            return


def run_rest(names: list[str], budget: Budget) -> None:
    """Run what remains in a new process, because a kernel has taken this one's device with it."""
    print("== the device has failed in this process; going on in a new one", flush=True)
    if names:
        changed = ["--sections", ",".join(names), "--seconds", f"{budget.left():.0f}", "--resume"]
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *changed], check=False)


if __name__ == "__main__":
    main()
