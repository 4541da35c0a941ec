"""Does it help? Plain and rewritten models that learn the same text, each at its own best learning rate.

A Llama over bytes learns the source of the Python standard library. The contestants are the plain model, Block AttnRes
in 2, 4 and 8 blocks, Full AttnRes, and the sum in place of the mean. All of one seed begin with the same weights and
see the same windows in the same order. Three steps, each of which goes on where it was interrupted:

    python benchmarks/learning.py sweep --size 0.4M     # every contestant at four learning rates, or more
    python benchmarks/learning.py seeds --size 0.4M     # at its best rate: two seeds more
    python benchmarks/learning.py report                # the tables, from the files of all runs

The best rate is the one with the least loss on the validation text. If it is the first or the last of those tried, the
next one, half or twice of it, is tried too. What is reported is the loss on the test text, which nothing is chosen by.
Every run is a file below ``results/learning``.

    python benchmarks/learning.py --quick               # all steps with tiny models, in a temporary folder
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _environment import write_results
from _learning import CONTESTANTS, SIZES, Run, Text, finished, read_text, train
from _learning_report import summary, tables

RESULTS = Path(__file__).parent / "results" / "learning"


class Study:
    """The runs of one size: those that are there, and those that are missing."""

    def __init__(self, size: str, folder: Path, work: Path, device: torch.device, deadline: float) -> None:
        self.size, self.folder, self.work, self.device, self.deadline = size, folder, work, device, deadline
        self.text: Text | None = None

    def losses(self, contestant: str, seed: int = 0) -> dict[float, float]:
        """The validation loss of ``contestant`` at every rate that was tried; infinite where it diverged."""
        return {
            found["run"]["rate"]: math.inf if found["validation"] is None else found["validation"]
            for found in finished(self.folder, self.size)
            if found["run"]["contestant"] == contestant and found["run"]["seed"] == seed
        }

    def best_rate(self, contestant: str) -> float:
        """The rate with the least validation loss of the first seed."""
        losses = self.losses(contestant)
        if not set(SIZES[self.size].rates) <= losses.keys():
            raise SystemExit(f"{contestant} was not tried at every rate: run the sweep of {self.size} first")
        return min(losses, key=losses.__getitem__)

    def sweep(self, contestant: str) -> None:
        """Try the rates of the size; and further ones, as long as the best is at an end."""
        for rate in SIZES[self.size].rates:
            self.run(Run(self.size, contestant, rate, 0))
        for _ in range(SIZES[self.size].extra_rates):
            best, tried = self.best_rate(contestant), sorted(self.losses(contestant))
            if best not in (tried[0], tried[-1]):
                return
            self.run(Run(self.size, contestant, best / 2 if best == tried[0] else best * 2, 0))

    def seeds(self, contestant: str) -> None:
        """All seeds at the best rate; the first one is of the sweep."""
        for seed in range(1, SIZES[self.size].seeds):
            self.run(Run(self.size, contestant, self.best_rate(contestant), seed))

    def run(self, run: Run) -> None:
        """Do ``run``, unless its file is there."""
        if (self.folder / run.path).exists():
            return
        if time.monotonic() > self.deadline:
            raise SystemExit("the time given is over; the same command goes on")
        self.text = self.text or read_text()
        # What is inside of a model is written down once for every contestant, at its best rate.
        look = run.seed == 1
        found = train(run, self.text, self.device, self.folder, self.work, look=look)
        print(f"{run.path}: validation {found['validation']}, test {found['test']}", flush=True)


def report(folder: Path) -> dict[str, Any]:
    """The summary of all sizes that have runs, printed and written beside them."""
    found = {
        size: summary(list(finished(folder, size))) for size in SIZES if next(finished(folder, size), None) is not None
    }
    write_results(folder / "summary.json", found)
    print(tables(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("sweep", "seeds", "report"), default="report")
    parser.add_argument("--size", choices=[name for name in SIZES if name != "quick"], default="0.4M")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; two runs of one each use two cores better")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "attnres-learning")
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    deadline = time.monotonic() + 60 * settings.minutes
    if settings.quick:
        with tempfile.TemporaryDirectory() as folder:
            study = Study("quick", Path(folder), Path(folder) / "work", torch.device("cpu"), deadline)
            for step in (study.sweep, study.seeds):
                for contestant in settings.contestants:
                    step(contestant)
            report(Path(folder))
    elif settings.step == "report":
        report(settings.out)
    else:
        study = Study(settings.size, settings.out, settings.work, torch.device(settings.device), deadline)
        for contestant in settings.contestants:
            getattr(study, settings.step)(contestant)


if __name__ == "__main__":
    main()
