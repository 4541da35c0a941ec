"""What a step of every contestant of `benchmarks/learning.py` costs: fewer tokens may still take longer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from _environment import environment
from _learning import SIZES, VOCABULARY
from _learning_lane import Lane
from _learning_trainer import Trainer

ROUNDS, STEPS = 9, 5


def step_times(size: str, contestants: Sequence[str], device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds a training step; contestants take turns, a round each, and are compared within a round.

    Returns:
        By contestant: ``seconds``, the median of the rounds; ``ratio`` to the first contestant, round by round: its
        least, median and largest value. Beside them the size and the environment.
    """
    lanes = {}
    for name in contestants:
        trainer = Trainer(name, SIZES[size], device)
        trainer.compile()
        lanes[name] = trainer.lanes[0]
        lanes[name].begin(trainer.added)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, lane in lanes.items():
            taken[name].append(_seconds(lane))
    first = taken[contestants[0]]
    found = {}
    for name, seconds in taken.items():
        ratios = [mine / other for mine, other in zip(seconds, first, strict=True)]
        of_ratio = [round(x, 3) for x in (min(ratios), statistics.median(ratios), max(ratios))]
        found[name] = {"seconds": round(statistics.median(seconds), 5), "ratio": of_ratio}
    return {"size": size, "steps": found, "environment": environment()}


def _seconds(lane: Lane) -> float:
    """Of one step, the mean of a few, without the first."""
    batch = torch.randint(VOCABULARY, lane.tokens.shape, generator=torch.Generator().manual_seed(0))
    batch, rates = batch.to(lane.tokens.device), torch.full_like(lane.rates, 1e-3)
    with lane.on_stream():
        lane.step(batch, rates)
        lane.loss.item()
        begin = time.perf_counter()
        for _ in range(STEPS):
            lane.step(batch, rates)
        lane.loss.item()
    return (time.perf_counter() - begin) / STEPS
