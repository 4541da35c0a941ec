"""The runs of one size of `benchmarks/learning.py`: which are there, which are missing, and in what order they go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _environment import write_results
from _learning import CONTESTANTS, SIZES, STAGES, Run, Text, finished, read_text
from _learning_trainer import Trained, Trainer
from torch import Tensor

ATTNRES_RATES = (1.0, 10.0, 100.0)
# Of the plain model that others go on from: one that no contestant has.
BASE_SEED = 100
# Parameters of a model whose weights are kept, after a run on a GPU.
MOST_KEPT = 1e6


class Study:
    """The runs of one size.

    Args:
        size: A key of ``SIZES``.
        folder: That of the results; every run is a file.
        work: Where the plain model that others go on from is kept, and runs that are not finished.
        device: Where to train.
        deadline: By ``time.monotonic()``; no run begins after it.
        shared: Whether another process trains the plain model, to be waited for.
    """

    def __init__(
        self, size: str, folder: Path, work: Path, device: torch.device, deadline: float, *, shared: bool = False
    ) -> None:
        self.size, self.folder, self.work, self.device, self.deadline = size, folder, work, device, deadline
        self.shared = shared
        self.texts: dict[str, Text] = {}
        self.trainers: dict[str, Trainer] = {}

    def losses(self, contestant: str, stage: str = "scratch") -> dict[float, float]:
        """The validation loss of the first seed at every rate that was tried; infinite where it diverged."""
        return {
            found["run"]["rate"]: math.inf if found["validation"] is None else found["validation"]
            for found in finished(self.folder, self.size, stage)
            if found["run"]["contestant"] == contestant
            and found["run"]["seed"] == 0
            and found["run"].get("attnres_rate", 1.0) == 1.0
        }

    def untried(self, contestant: str, stage: str = "scratch") -> list[float]:
        """Rates to try next: those of the size; then a further one, as long as the best is at an end."""
        losses, size = self.losses(contestant, stage), SIZES[self.size]
        if missing := [rate for rate in size.rates if rate not in losses]:
            return missing
        tried, best = sorted(losses), min(losses, key=losses.__getitem__)
        if best not in (tried[0], tried[-1]) or len(tried) >= len(size.rates) + size.extra_rates:
            return []
        return [best / 2 if best == tried[0] else best * 2]

    def best_rate(self, contestant: str, stage: str = "scratch") -> float:
        """The rate with the least validation loss of the first seed."""
        losses = self.losses(contestant, stage)
        if not set(SIZES[self.size].rates) <= losses.keys():
            raise SystemExit(f"{contestant} was not tried at every rate: run the sweep of {self.size} first")
        return min(losses, key=losses.__getitem__)

    def sweep(self, contestant: str, stage: str = "scratch") -> None:
        """Try all rates that there are to try."""
        while rates := self.untried(contestant, stage):
            self.run([Run(self.size, contestant, rate, 0, stage) for rate in rates])

    def seeds(self, contestant: str, *others: Run) -> None:
        """All seeds at the best rate, and beside them ``others``; the first seed is of the sweep."""
        best = self.best_rate(contestant)
        self.run([*(Run(self.size, contestant, best, seed) for seed in range(1, SIZES[self.size].seeds)), *others])

    def retrofit(self, contestant: str) -> None:
        """Go on from the trained plain model, in three seeds; the plain one at every rate first."""
        if self.shared and contestant != "plain":
            self._wait(lambda: self._kept().exists() and not self.untried("plain", "retrofit"))
        self.sweep("plain", "retrofit")
        best = self.best_rate("plain", "retrofit")
        multiples = ATTNRES_RATES if CONTESTANTS[contestant] is not None else (1.0,)
        seeds = range(SIZES[self.size].seeds)
        self.run([Run(self.size, contestant, best, seed, "retrofit", times) for times in multiples for seed in seeds])

    def scratch(self, contestant: str) -> None:
        """The first two steps."""
        self.sweep(contestant)
        self.seeds(contestant)

    def whole(self, contestant: str) -> None:
        """All three steps; the plain model that others wait for is trained beside the seeds of the plain one."""
        self.sweep(contestant)
        self.seeds(contestant, *([self._base()] if contestant == "plain" else []))
        self.retrofit(contestant)

    def look(self, contestant: str) -> None:
        """Write down what is inside of the models whose last weights were kept, in the files of their runs."""
        for stage in STAGES:
            for found in list(finished(self.folder, self.size, stage)):
                run = Run(**found["run"])
                kept = self._weights(run)
                if run.contestant != contestant or found["looks"] or not kept.exists():
                    continue
                if contestant not in self.trainers:
                    # To compile would take longer.
                    size = replace(run.shape, backend="eager")
                    self.trainers[contestant] = Trainer(contestant, size, torch.device("cpu"))
                trainer = self.trainers[contestant]
                write_results(self._file(run), found | {"looks": [trainer.look(torch.load(kept), self.text(stage))]})

    def trained(self) -> dict[str, Tensor]:
        """The weights of the plain model that the others go on from; they are trained if they are not there."""
        self.run([self._base()])
        weights: dict[str, Tensor] = torch.load(self._kept(), weights_only=True)
        return weights

    def trainer(self, contestant: str) -> Trainer:
        """The trainer of a contestant, made once; a file in the folder for work says that it is compiled."""
        if contestant not in self.trainers:
            self.trainers[contestant] = Trainer(contestant, SIZES[self.size], self.device)
            if self.shared:
                self.trainers[contestant].compile()
                ready = self.work / self.size / f"{contestant}.ready"
                ready.parent.mkdir(parents=True, exist_ok=True)
                ready.touch()
        return self.trainers[contestant]

    def text(self, stage: str) -> Text:
        """The text of a stage, read once."""
        if stage not in self.texts:
            self.texts[stage] = read_text(stage)
        return self.texts[stage]

    def run(self, runs: Sequence[Run]) -> None:
        """Do those of ``runs``, all of one contestant and stage, that have no file."""
        missing = [run for run in runs if not self._file(run).exists()]
        while missing:
            if time.monotonic() > self.deadline:
                raise SystemExit("the time given is over; the same command goes on")
            weights = self.trained() if missing[0].stage == "retrofit" else None
            trainer = self.trainer(missing[0].contestant)
            # In parts of about one size.
            parts = -(-len(missing) // trainer.at_once)
            now, missing = missing[: -(-len(missing) // parts)], missing[-(-len(missing) // parts) :]
            # What is inside of a model is written down once for every contestant, at its best rate.
            look = now[0].seed == 1
            found = trainer.train(now, self.text(now[0].stage), weights=weights, work=self.work, look=look)
            for run, trained in zip(now, found, strict=True):
                self._write(run, trained)

    def _write(self, run: Run, trained: Trained) -> None:
        result = trained.result
        if run.seed == BASE_SEED:
            _save(trained.weights, self._kept())
        else:
            write_results(self._file(run), result)
        if self.device.type == "cuda" and run.seed == 1 and result["parameters"] < MOST_KEPT:
            # Nobody has looked inside; half the bytes are enough to do it later.
            kept = {name: weight.half() for name, weight in trained.weights.items()}
            _save(kept, self._weights(run))
        print(f"{run.path}: validation {result['validation']}, test {result['test']}", flush=True)

    def _base(self) -> Run:
        return Run(self.size, "plain", self.best_rate("plain"), BASE_SEED)

    def _weights(self, run: Run) -> Path:
        return self.work / "weights" / run.path.with_suffix(".pt")

    def _kept(self) -> Path:
        return self.work / self.size / "trained.pt"

    def _file(self, run: Run) -> Path:
        return self._kept() if run.seed == BASE_SEED else self.folder / run.path

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if time.monotonic() > self.deadline:
                raise SystemExit("the time given is over; the plain model was not there")
            time.sleep(0.5)


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """Write at once, as other processes wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(weights, part)
    part.replace(path)
