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
In the third step one plain model, trained for the whole time at its best rate, goes on with the tests of the standard
library: plain, which again has the best of all rates, and at that rate rewritten in every form, the sites learning at
1, 10 and 100 times it. Every run is a file below ``results/learning``.

    python benchmarks/learning.py --quick               # all steps with tiny models, in a temporary folder
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _environment import write_results
from _learning import CONTESTANTS, SIZES, STAGES, STREAMS, Run, Text, finished, read_text, train
from _learning_report import summary, tables
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "learning"
ATTNRES_RATES = (1.0, 10.0, 100.0)
# Of the plain model that others go on from: one that no contestant has.
BASE_SEED = 100


class Study:
    """The runs of one size: those that are there, and those that are missing."""

    def __init__(self, size: str, folder: Path, work: Path, device: torch.device, deadline: float) -> None:
        self.size, self.folder, self.work, self.device, self.deadline = size, folder, work, device, deadline
        self.texts: dict[str, Text] = {}

    def losses(self, contestant: str, stage: str = "scratch") -> dict[float, float]:
        """The validation loss of the first seed at every rate that was tried; infinite where it diverged."""
        return {
            found["run"]["rate"]: math.inf if found["validation"] is None else found["validation"]
            for found in finished(self.folder, self.size, stage)
            if found["run"]["contestant"] == contestant and found["run"]["seed"] == 0
        }

    def best_rate(self, contestant: str, stage: str = "scratch") -> float:
        """The rate with the least validation loss of the first seed."""
        losses = self.losses(contestant, stage)
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

    def retrofit(self, contestant: str) -> None:
        """Go on from the trained plain model, in three seeds; the plain one at every rate first."""
        for rate in SIZES[self.size].rates:
            self.run(Run(self.size, "plain", rate, 0, "retrofit"))
        best = self.best_rate("plain", "retrofit")
        for times in ATTNRES_RATES if CONTESTANTS[contestant] is not None else (1.0,):
            for seed in range(SIZES[self.size].seeds):
                self.run(Run(self.size, contestant, best, seed, "retrofit", times))

    def trained(self) -> dict[str, Tensor]:
        """The weights of the plain model that the others go on from; they are trained if they are not there."""
        kept = self.work / self.size / "trained.pt"
        if not kept.exists():
            run = Run(self.size, "plain", self.best_rate("plain"), BASE_SEED)
            kept.parent.mkdir(parents=True, exist_ok=True)
            train(run, self.text("scratch"), self.device, self.work, self.work, look=False, keep=kept)
        return torch.load(kept, map_location=self.device, weights_only=True)

    def text(self, stage: str) -> Text:
        """The text of a stage, read once."""
        if stage not in self.texts:
            self.texts[stage] = read_text(stage)
        return self.texts[stage]

    def run(self, run: Run) -> None:
        """Do ``run``, unless its file is there."""
        if (self.folder / run.path).exists():
            return
        if time.monotonic() > self.deadline:
            raise SystemExit("the time given is over; the same command goes on")
        weights = self.trained() if run.stage == "retrofit" else None
        # What is inside of a model is written down once for every contestant, at its best rate.
        look = run.seed == 1
        found = train(run, self.text(run.stage), self.device, self.folder, self.work, look=look, weights=weights)
        print(f"{run.path}: validation {found['validation']}, test {found['test']}", flush=True)


def report(folder: Path) -> dict[str, Any]:
    """The summary of all sizes that have runs, printed and written beside them."""
    found = {}
    for size, stage in itertools.product(SIZES, STAGES):
        if runs := list(finished(folder, size, stage)):
            found[size if stage == "scratch" else f"{size}, {stage}"] = summary(runs)
    write_results(folder / "summary.json", found)
    print(tables(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("sweep", "seeds", "retrofit", "report"), default="report")
    parser.add_argument("--size", choices=[name for name in SIZES if name != "quick"], default="0.4M")
    here = [name for name in CONTESTANTS if name not in STREAMS or importlib.util.find_spec("hyper_connections")]
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=here)
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
            for step in (study.sweep, study.seeds, study.retrofit):
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
