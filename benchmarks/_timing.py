"""Times of calls that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from attnres_rewrite.bench.timing import timed


def in_turns(contestants: dict[Any, Callable[[], Any]], repeats: int, device: str) -> dict[Any, list[float]]:
    """Seconds of every call, the contestants taking turns; the first two turns do not count."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, call in contestants.items():
            seconds = timed(call, torch.device(device))
            if turn >= 2:
                times[name].append(seconds)
    return times


def medians(contestants: dict[Any, Callable[[], Any]], repeats: int, device: str) -> dict[Any, float]:
    """Seconds per call, the contestants taking turns."""
    return {name: statistics.median(values) for name, values in in_turns(contestants, repeats, device).items()}
