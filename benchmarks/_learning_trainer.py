"""Training runs of `benchmarks/learning.py`: one model a contestant, compiled once, and what is written down."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _learning import VOCABULARY, Run, Size, Text
from _learning_lane import Lane
from _learning_model import build, inside, learning_rates, new_model
from torch import Tensor

from attnres_rewrite.demo.corpus import Corpus

# Parts of a run at which the held-out loss is taken, and those at which the inside of the model is looked at.
EVALUATIONS = 20
LOOKS = (0.0, 0.1, 0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that has ended: what its file says, and its last weights, on the CPU."""

    result: dict[str, Any]
    weights: dict[str, Tensor]


class Trainer:
    """The model of one contestant, for all its runs: only their weights, rates and texts differ."""

    def __init__(self, contestant: str, size: Size, device: torch.device) -> None:
        self.contestant, self.size, self.device = contestant, size, device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.model, self.call = build(contestant, size, device)
        # Of the parameters that a rewrite has added: they begin alike in every run.
        self.added = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.lanes: list[Lane] = []
        self.off: float | None = None
        self.at_once = size.at_once if device.type == "cuda" else 1

    def compile(self, lanes: int = 1) -> None:
        """Have ``lanes`` ready, the first of which compiles the model."""
        if len(self.lanes) >= lanes:
            return
        while len(self.lanes) < lanes:
            self.lanes.append(Lane(self.model, self.call, self.contestant, self.size))
            self.lanes[-1].capture()
        if any(lane.graphs is not None for lane in self.lanes):
            self.off = self.compare()
            print(f"captured steps on {lanes} lanes: losses are off by {self.off:.2g}", flush=True)

    def compare(self, steps: int = 10) -> float:
        """How far the loss is off after captured steps on all lanes at once, against the same that are not captured.

        Kernels of several lanes that used the same memory would show here.
        """
        size, losses = self.size, []
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(VOCABULARY, (size.batch, size.length), generator=generator).to(self.device)
        rates = torch.full_like(self.lanes[0].rates, 1e-3)
        for lanes, captured in ((self.lanes[:1], False), (self.lanes, True)):
            for lane in lanes:
                lane.begin(self.added)
            self._synchronize()
            for _ in range(steps):
                for lane in lanes:
                    with lane.on_stream():
                        lane.step(batch, rates, captured=captured)
            self._synchronize()
            losses += [lane.loss.item() for lane in lanes]
        return max(abs(loss - losses[0]) for loss in losses[1:])

    def train(
        self,
        runs: Sequence[Run],
        text: Text,
        *,
        weights: dict[str, Tensor] | None = None,
        work: Path | None = None,
        look: bool = False,
    ) -> list[Trained]:
        """Train to the end, all ``runs`` side by side.

        Args:
            runs: At most ``at_once``, of one size and stage.
            text: What on.
            weights: Those to begin with; if left out, random ones by the seed.
            work: Where a run on the CPU keeps its state, from which it goes on if it was interrupted.
            look: Whether output magnitudes, gradient norms and depth weights are written down on the way; on the CPU
                only, since they compile the model again.
        """
        self.compile(len(runs))
        on_cuda = self.device.type == "cuda"
        shape = runs[0].shape
        validation = _held_out(text.validation, shape, shape.held_out).to(self.device)
        test = _held_out(text.test, shape, 4 * shape.held_out).to(self.device)
        trainings = [
            _Training(run, lane, self._first(run, weights), text, validation, look and not on_cuda)
            for run, lane in zip(runs, self.lanes, strict=False)
        ]
        saved = None if on_cuda or work is None else work / runs[0].path.with_suffix(".pt")
        if saved is not None and saved.exists():
            trainings[0].load(saved)
        self._synchronize()
        for _ in range(trainings[0].done, shape.steps):
            for training in trainings:
                with training.lane.on_stream():
                    evaluated = training.advance()
            # To see whether a run on a GPU has diverged would make the host wait for it.
            if evaluated and not on_cuda:
                if trainings[0].diverged():
                    break
                if saved is not None:
                    trainings[0].save(saved)
        ended = [training.end(test, self.off) for training in trainings]
        if saved is not None:
            saved.unlink(missing_ok=True)
        return ended

    def look(self, weights: dict[str, Tensor], text: Text) -> dict[str, Any]:
        """What is inside of a model with the last ``weights`` of a run; ``text`` may be another than it learned."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        batch = _held_out(text.validation, self.size, self.size.batch)[0].long()
        return {"part": 1.0, "text": text.digest(), **inside(self.model, self.contestant, batch.to(self.device))}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _first(self, run: Run, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The weights that ``run`` begins with, by name."""
        plain = new_model(self.contestant, self.size, run.seed, weights)
        return self.added | {name: p.detach() for name, p in plain.named_parameters()}


class _Training:
    """A run on its way."""

    def __init__(
        self, run: Run, lane: Lane, first: dict[str, Tensor], text: Text, validation: Tensor, look: bool
    ) -> None:
        self.run, self.shape, self.lane, self.text, self.validation = run, run.shape, lane, text, validation
        device = validation.device
        self.batches = text.windows(self.shape, run.seed).to(device)
        self.rates = learning_rates(run, len(lane.rates)).to(device)
        lane.begin(first)
        self.every = max(1, self.shape.steps // EVALUATIONS)
        self.look_at = {round(part * self.shape.steps): part for part in LOOKS} if look else {}
        self.done = 0
        self.losses: list[Tensor] = []
        self.looks: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def advance(self) -> bool:
        """One step; whether the held-out loss was taken after it."""
        if self.done == 0:
            self._look()
        begin = time.perf_counter()
        self.lane.step(self.batches[self.done], self.rates[self.done])
        self.seconds.append(time.perf_counter() - begin)
        self.done += 1
        evaluated = self.done % self.every == 0 or self.done == self.shape.steps
        if evaluated:
            self.losses.append(self.lane.held_out_loss(self.validation))
        self._look()
        return evaluated

    def diverged(self) -> bool:
        """Whether the last held-out loss is no number."""
        return not math.isfinite(self.losses[-1].item())

    def end(self, test: Tensor, off: float | None) -> Trained:
        """What there is to say of the run; ``off`` is of :meth:`Trainer.compare`."""
        with self.lane.on_stream():
            test_loss = self.lane.held_out_loss(test)
        on_cuda = test.is_cuda
        if on_cuda:
            torch.cuda.synchronize()
        curve = self._curve()
        ended = len(curve) > 0 and curve[-1][0] == self.shape.tokens
        result = {
            "run": dataclasses.asdict(self.run),
            "size": dataclasses.asdict(self.shape),
            "parameters": sum(weight.numel() for weight in self.lane.weights),
            "text": self.text.digest(),
            "curve": curve,
            # None of a run that diverged.
            "validation": curve[-1][1] if ended else None,
            "test": round(test_loss.item(), 5) if ended else None,
            # On a GPU several runs take turns, and nothing waits for a step.
            "median_step_seconds": round(statistics.median(self.seconds), 5) if self.seconds and not on_cuda else None,
            "looks": self.looks,
            "captured_loss_is_off_by": off,
            "environment": _environment() | {"float32_products": torch.get_float32_matmul_precision()},
        }
        names = [name for name, _ in self.lane.model.named_parameters()]
        return Trained(result, {n: w.cpu().clone() for n, w in zip(names, self.lane.weights, strict=True)})

    def _curve(self) -> list[list[float]]:
        """Tokens and validation loss, as long as that is a number."""
        curve: list[list[float]] = []
        for i, loss in enumerate(self.losses):
            step = min((i + 1) * self.every, self.shape.steps)
            value = loss.item()
            if not math.isfinite(value):
                break
            curve.append([step * self.shape.batch * self.shape.length, round(value, 5)])
        return curve

    def _look(self) -> None:
        if self.done in self.look_at:
            self.lane.use()
            found = inside(self.lane.model, self.run.contestant, self.validation[0].long())
            self.looks.append({"part": self.look_at[self.done], **found})

    def save(self, path: Path) -> None:
        """Replace what is on disk, at once."""
        state = {"weights": self.lane.weights, "moments": self.lane.moments, "losses": self.losses}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save({**state, "done": self.done, "looks": self.looks}, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what is on disk."""
        saved = torch.load(path, weights_only=True)
        for name in ("weights", "moments"):
            for tensor, value in zip(getattr(self.lane, name), saved[name], strict=True):
                tensor.copy_(value)
        self.done, self.looks, self.losses = saved["done"], saved["looks"], saved["losses"]


@functools.cache
def _environment() -> dict[str, Any]:
    return environment()


def _held_out(corpus: Corpus, size: Size, windows: int) -> Tensor:
    """Windows that lie evenly over held-out text, uint8 ``[n, batch, length]``."""
    batches = corpus.validation_batches(max(1, windows // size.batch), size.batch, size.length)
    return torch.stack(batches).to(torch.uint8)
