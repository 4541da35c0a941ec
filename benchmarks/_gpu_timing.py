"""Timing on a device: CUDA graphs, cold caches, contestants that take turns, and a budget of seconds."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import write_results
from _peers import NotAvailable, reason

Call = Callable[[], Any]


class OutOfTime(NotAvailable):
    """The budget does not allow what would come next."""


class Budget:
    """Seconds that remain of a total."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raise :class:`OutOfTime` unless that much is left."""
        if self.left() < seconds:
            raise OutOfTime(f"out of time: {max(self.left(), 0):.0f} s left, {seconds:.0f} s wanted")


class Record:
    """Results that are on disk after every change, so that a run that is cut off loses nothing."""

    def __init__(self, path: Path, start: dict[str, Any]) -> None:
        self.path, self.results = path, start
        self.write()

    def write(self) -> None:
        json.dumps(self.results)
        write_results(self.path, self.results)

    def __setitem__(self, key: str, value: Any) -> None:
        self.results[key] = value
        self.write()

    def __getitem__(self, key: str) -> Any:
        return self.results[key]


class Device:
    """The device under test and how time is taken on it."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name == "cuda"
        # Written between two timed calls, so that none finds its input in a cache of up to this size.
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=name) if self.cuda else None
        self._pool: Any = None

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def broken(self) -> bool:
        """Whether a kernel has failed in a way that nothing more can run on the device in this process."""
        try:
            self.synchronise()
        except Exception:
            return True
        return False

    def seconds(self, call: Call) -> float:
        """Wall-clock seconds of one call."""
        self.synchronise()
        start = time.perf_counter()
        call()
        self.synchronise()
        return time.perf_counter() - start

    def captured(self, call: Call) -> tuple[Call, str | None]:
        """``call`` as the replay of a CUDA graph; if that cannot be, ``call`` itself and the reason.

        What ``call`` returns is dropped, so all graphs can share one pool of memory. What it reads is kept with it: a
        graph holds addresses, and the next capture gives free memory back to the driver.
        """
        if not self.cuda:
            return call, "no CUDA"
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._pool = self._pool or self._kept_pool()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                call()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()
            return call, reason(error)

        def replay(_kept: Call = call) -> None:
            graph.replay()

        return replay, None

    def _kept_pool(self) -> Any:
        """A pool for graphs that lives as long as this object: one dies with its last graph, and is then refused."""
        self._pool_keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._pool_keeper):
            self._in_pool = torch.zeros(1, device=self.name)
        return self._pool_keeper.pool()

    def medians(self, contestants: dict[Any, Call], repeats: int, *, cold: bool = True) -> dict[Any, float]:
        """Median seconds per call, the contestants taking turns and every other turn in reverse order."""
        times: dict[Any, list[float]] = {name: [] for name in contestants}
        for turn in range(repeats + 2):
            order = list(contestants.items())[:: 1 if turn % 2 else -1]
            taken = self._turn_on_cuda(order, cold) if self.cuda else [self.seconds(call) for _, call in order]
            if turn >= 2:
                for (name, _), seconds in zip(order, taken, strict=True):
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}

    def _turn_on_cuda(self, order: list[tuple[Any, Call]], cold: bool) -> list[float]:
        events = []
        for _, call in order:
            if cold and self._flush is not None:
                # It also keeps the device busy while the host launches, so that launches are not timed.
                self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def copy(self, nbytes: int) -> Call:
        """What reads and writes ``nbytes`` together.

        By a kernel: a large copy that is captured in a graph is not one, and moves two thirds as much a second.
        """
        origin = torch.zeros(nbytes // 4, dtype=torch.int16, device=self.name)
        target = torch.empty_like(origin)
        return self.captured(lambda: torch.add(origin, 1, out=target))[0]

    def copy_bandwidth(self, nbytes: int, repeats: int = 20) -> float:
        """Bytes a second that a copy reads and writes, together."""
        return nbytes / self.medians({"copy": self.copy(nbytes)}, repeats)["copy"]
