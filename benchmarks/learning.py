"""Does it help? Plain and rewritten models that learn the same text, each at its own best learning rate.

A Llama over bytes learns the source of the Python standard library. The contestants are the plain model, Block AttnRes
in 2, 4 and 8 blocks, Full AttnRes, the sum in place of the mean, and manifold-constrained hyper-connections where the
package ``hyper-connections`` is installed (extra ``bench``). All of one seed begin with the same weights and see the
same windows in the same order. Four steps, each of which goes on where it was interrupted:

    python benchmarks/learning.py sweep --size 0.4M     # every contestant at four learning rates, or more
    python benchmarks/learning.py seeds --size 0.4M     # at its best rate: two seeds more
    python benchmarks/learning.py retrofit --size 0.4M  # a plain model, trained, goes on with other text
    python benchmarks/learning.py report                # the tables, from the files of all runs

The best rate is the one with the least loss on the validation text. If it is the first or the last of those tried, the
next one, half or twice of it, is tried too. What is reported is the loss on the test text, which nothing is chosen by.
In the third step one plain model, trained for the whole time at its best rate, goes on with the source of PyTorch:
plain, which again has the best of all rates, and at that rate rewritten in every form, the sites learning at 1, 10 and
100 times it. Every run is a file below ``results/learning``.

    python benchmarks/learning.py all --size 0.4M --larger 5M-short --seconds 190 --out DIR --pack FILE.tar.gz

is all of it on one GPU, a process a contestant, until the time is over. There a step is a CUDA graph, several runs of a
contestant share the GPU, matrix products are in TF32, and the inside of the models is not written down, but their last
weights are kept: unpacked to ``WORK/weights``, ``look --work WORK`` writes down on a CPU what is in them.

    python benchmarks/learning.py --quick               # all steps with tiny models, in a temporary folder
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The package need not be installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from _environment import unpack_wheels, write_results  # noqa: E402
from _learning import CONTESTANTS, SIZES, STAGES, STREAMS, finished, read_text  # noqa: E402
from _learning_all import Everybody, in_order  # noqa: E402
from _learning_report import inside_table, summary, tables  # noqa: E402
from _learning_scaling import scaling, scaling_text  # noqa: E402
from _learning_study import Study  # noqa: E402
from _learning_time import step_times  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "learning"
STEPS = ("sweep", "seeds", "scratch", "retrofit", "whole", "all", "look", "time", "report")


def report(folder: Path) -> dict[str, Any]:
    """The summary of all sizes that have runs, printed and written beside them."""
    found, texts = {}, set()
    for size, stage in itertools.product(SIZES, STAGES):
        if runs := list(finished(folder, size, stage)):
            learned = {run["text"] for run in runs}
            if len(learned) > 1:
                raise SystemExit(f"runs of {size} ({stage}) in {folder} learned different texts: keep those of one")
            found[size if stage == "scratch" else f"{size}, {stage}"] = summary(runs)
            texts |= learned if stage == "scratch" else set()
    write_results(folder / "summary.json", found)
    print(tables(found), inside_table(found), sep="\n")
    if len(texts) > 1:
        print("Loss against compute: the sizes learned different texts, so there is no exponent.")
        return found
    laws = scaling(found)
    print(scaling_text(found, laws))
    if laws:
        write_results(folder / "scaling.json", laws)
    return found


def quick(contestants: list[str]) -> None:
    """All steps with tiny models."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study("quick", Path(folder), Path(folder) / "work", torch.device("cpu"), math.inf)
        for step in (study.sweep, study.seeds, study.retrofit):
            for contestant in contestants:
                step(contestant)
        report(Path(folder))


def see_that_it_is_the_text(folder: Path, size: str, stage: str, digest: str) -> None:
    """Refuse to add runs of a text to those of another, before any time is spent on them."""
    if {run["text"] for run in finished(folder, size, stage)} - {digest}:
        raise SystemExit(
            f"runs of {size} ({stage}) in {folder} learned another text than this machine has, so that new ones could "
            "not be compared with them: give an empty folder with --out, and train the plain model too"
        )


def everybody(settings: argparse.Namespace, contestants: list[str]) -> None:
    """All steps of all contestants, in processes of their own."""
    deadline = time.monotonic() + settings.seconds
    for stage in STAGES:
        text = read_text(stage)
        for size in filter(None, (settings.size, settings.larger)):
            see_that_it_is_the_text(settings.out, size, stage, text.digest())
        print(f"{stage}: {len(text.train.train) / 1e6:.1f} MB of text", flush=True)
    sizes = [size for size in (settings.size, settings.larger) if size]
    ran = {(size, run["run"]["contestant"]) for size in sizes for run in finished(settings.out, size)}
    jobs = in_order(settings.size, settings.larger, contestants, ran)
    arguments = ["--device", settings.device, "--threads", str(settings.threads)]
    everyone = Everybody(jobs, settings.out, settings.work, settings.processes, arguments)
    everyone.work_until(deadline, settings.pack)
    report(settings.out)


def parse() -> argparse.Namespace:
    sizes = [name for name in SIZES if name != "quick"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=STEPS, default="report")
    parser.add_argument("--size", choices=[*sizes, "quick"], default="0.4M")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; two runs of one each use two cores better")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "attnres-learning")
    parser.add_argument("--wheels", type=Path, help="folder of pure Python wheels, for hyper-connections")
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    whole = parser.add_argument_group("all")
    whole.add_argument("--larger", choices=sizes, help="a second size, of which only the first two steps are done")
    whole.add_argument("--seconds", type=float, default=600, help="after which everything is ended")
    whole.add_argument("--processes", type=int, default=8, help="that may compile at the same time")
    whole.add_argument("--pack", type=Path, help="a .tar.gz of the results, written every now and then")
    return parser.parse_args()


def main() -> None:
    settings = parse()
    if settings.wheels:
        unpack_wheels(settings.wheels)
    here = [name for name in CONTESTANTS if name not in STREAMS or importlib.util.find_spec("hyper_connections")]
    contestants = settings.contestants or here
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1" if settings.device == "cpu" else "2")
    if settings.quick:
        quick(contestants)
    elif settings.step == "report":
        report(settings.out)
    elif settings.step == "time":
        found = step_times(settings.size, contestants, torch.device(settings.device))
        write_results(settings.out / "step_time.json", found)
        print(found["steps"])
    elif settings.step == "all":
        everybody(settings, contestants)
    else:
        deadline = time.monotonic() + 60 * settings.minutes
        device = torch.device(settings.device)
        study = Study(settings.size, settings.out, settings.work, device, deadline, shared=settings.shared)
        for contestant in contestants:
            getattr(study, settings.step)(contestant)


if __name__ == "__main__":
    main()
