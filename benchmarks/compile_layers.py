"""The wait for the compiler: a plain model, its rewritten form with every layer compiled, and with alike layers once.

Each form runs its first step in a process of its own with an empty cache; the forms take turns. Wall time is what a
user waits for; CPU time, of the process and all that it starts, depends less on what else the machine does. Then the
median of later steps, which is a first look. "saved" is what a training step keeps for the backward (`_memory.py`).
"regions" is the plain model with every layer under PyTorch's own `torch.compiler.nested_compile_region`.

With `--turns N` later steps are measured instead: one process compiles all forms, and they take turns, a step each, N
times. Ratios are taken within a turn. As in `attnres bench`, memory that is freed is kept: to get it back from the
system takes a third of a step here, at no fixed time.

    python benchmarks/compile_layers.py [--layers 12] [--width 256] [--length 256] [--batch 2] [--blocks 8]
        [--steps training inference] [--rounds 1] [--forms plain regions inline once] [--turns N]

Figures of the same settings that the file has already, of other layers or steps, are kept; so are forms that are not
measured now, if it is one round, each with the environment that it was measured in.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from _memory import memory_of_step
from _timing import in_turns, medians
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite
from attnres_rewrite.bench.forms import randomise_queries
from attnres_rewrite.bench.timing import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "compile_layers.json"
FORMS = ("plain", "regions", "inline", "once")
STEPS = ("training", "inference")
VOCABULARY, HEAD_WIDTH, LATER = 8192, 64, 5


def make_model(form: str, options: argparse.Namespace) -> nn.Module:
    """The model with seeded weights, to be compiled by its first call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // HEAD_WIDTH,
        num_key_value_heads=options.width // HEAD_WIDTH,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if form in ("plain", "regions"):
        if form == "regions":
            region = torch.compiler.nested_compile_region(type(model.model.layers[0]).forward)
            for layer in model.model.layers:
                layer.forward = types.MethodType(region, layer)
        model.compile()
        return model
    settings = attnres_rewrite.AttnResConfig(min(options.blocks, options.layers), compile_layers=form)
    attnres_rewrite.rewrite(model, config=settings)
    randomise_queries(model)
    return model


def measure(form: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one form, in this process; its cache must be empty."""
    # What happens once in a process counts for no form.
    torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))
    model = make_model(form, options).train(step == "training")
    loss_of, run = steps_of(model, step, options)
    files, before, start = cpp_files(), cpu_seconds(), time.perf_counter()
    loss = run()
    first = time.perf_counter() - start
    found = {"wall_s": first, "cpu_s": cpu_seconds() - before, "cpp_files": cpp_files() - files, "loss": loss.item()}
    if step == "training":
        parameters = model.parameters()
        found["gradient_norm"] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    found["step_s"] = medians({form: run}, LATER, "cpu")[form]
    return {**found, **memory_of_step(model, loss_of)} if step == "training" else found


def take_turns(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times of later steps, in this process; every ratio is to the plain model's step of the same turn."""
    keep_freed_memory()
    runs = {}
    for form in options.forms:
        runs[form] = steps_of(make_model(form, options).train(step == "training"), step, options)[1]
        runs[form]()
    times = in_turns(runs, options.turns, "cpu")
    return {form: summary(values, times) for form, values in times.items()}


def summary(values: list[float], times: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"step_s": statistics.median(values)}
    for other in ("plain", "inline"):
        if other in times and times[other] is not values:
            ratios = [value / base for value, base in zip(values, times[other], strict=True)]
            deciles = statistics.quantiles(ratios, n=10)
            found[f"of_{other}"] = [round(ratio, 4) for ratio in (statistics.median(ratios), deciles[0], deciles[-1])]
    return found


def steps_of(
    model: nn.Module, step: str, options: argparse.Namespace
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The loss of the model as a function, and a whole step."""
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(1))

    def loss_of() -> Tensor:
        logits = model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def run() -> Tensor:
        if step == "training":
            model.zero_grad()
            loss = loss_of()
            loss.backward()
            return loss
        with torch.no_grad():
            return loss_of()

    return loss_of, run


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cpp_files() -> int:
    """C++ files in the cache of this process."""
    return sum(1 for _ in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.cpp"))


def measure_apart(form: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own with an empty cache."""
    sizes = {name: getattr(options, name) for name in ("layers", "width", "length", "batch", "blocks")}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--measure", form, step, *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{form}, {step}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--turns", type=int, metavar="N", help="measure N later steps of each form instead")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(measure(*options.measure, options)))
        return
    kept = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    sizes = {name: getattr(options, name) for name in ("layers", "width", "length", "batch", "blocks")}
    for step in options.steps:
        if options.turns:
            new = {"turns": options.turns, "later_steps": take_turns(step, options)}
            print(step, options.layers, json.dumps(new), flush=True)
        else:
            new = {"rounds": rounds_of(step, options)}
        key = (step, sizes, "rounds" in new)
        old = next((run for run in kept if (run["step"], run["sizes"], "rounds" in run) == key), None)
        if old is not None:
            kept.remove(old)
            if len(new.get("rounds", ())) == len(old.get("rounds", ())) == 1:
                new["rounds"] = [{**with_environment(old), **new["rounds"][0]}]
        kept.append({"step": step, "sizes": sizes, "environment": environment(), **new})
        write_results(options.out, {"runs": kept})


def with_environment(run: dict[str, Any]) -> dict[str, Any]:
    """The figures of the only round of ``run``, each form with where it was measured: others will have another."""
    where = {"environment": run["environment"]}
    return {name: where | found if isinstance(found, dict) else found for name, found in run["rounds"][0].items()}


def rounds_of(step: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """First steps of all forms, as often as was asked for."""
    rounds = []
    for _ in range(options.rounds):
        load = os.getloadavg()[0]
        rounds.append({form: measure_apart(form, step, options) for form in options.forms})
        rounds[-1]["load_before"] = load
        print(step, options.layers, json.dumps(rounds[-1]), flush=True)
    return rounds


if __name__ == "__main__":
    main()
