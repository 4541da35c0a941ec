"""All of the study at once, on one GPU: a process a contestant, since a compiler keeps a core busy for a minute."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

# Size, contestant, and which steps of `learning.py`.
Job = tuple[str, str, str]

# By what the study wants to know first.
ORDER = (
    "plain",
    "mean-8",
    "add-8",
    "sum-8",
    "mean-4",
    "full",
    "mean-8-gate",
    "add-8-gate",
    "sum-8-gate",
    "mean-2",
    "mhc-4",
)
FIRST, FIRST_LARGER = 6, 3
PACK_EVERY = 20.0


def in_order(
    size: str, larger: str | None, contestants: Sequence[str], ran: Collection[tuple[str, str]] = ()
) -> list[Job]:
    """A few contestants of both sizes, then all others; the larger size is not gone on from.

    Within a size those come first that are not in ``ran``, pairs of a size and a contestant that has runs already, as
    the time of a machine may be short.
    """
    names = [name for name in ORDER if name in contestants]

    def jobs(of: str, step: str) -> list[Job]:
        return [(of, name, step) for name in sorted(names, key=lambda name: (of, name) in ran)]

    here, there = jobs(size, "whole"), [] if larger is None else jobs(larger, "scratch")
    return here[:FIRST] + there[:FIRST_LARGER] + here[FIRST:] + there[FIRST_LARGER:]


class Everybody:
    """The processes: at most ``at_once`` that are compiling, and all that are training."""

    def __init__(self, jobs: Sequence[Job], out: Path, work: Path, at_once: int, arguments: Sequence[str]) -> None:
        self.waiting, self.out, self.work, self.at_once = list(jobs), out, work, at_once
        self.arguments = arguments
        self.begin = time.monotonic()
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self.compiled: set[Job] = set()

    def work_until(self, deadline: float, pack: Path | None) -> None:
        """Start what can be started until ``deadline``, by ``time.monotonic()``; then all processes are ended."""
        packed = self.begin
        try:
            while (self.waiting or self.running) and time.monotonic() < deadline:
                self._note_ended()
                compiling = self._compiling()
                if self.waiting and len(compiling) < self.at_once:
                    job = self.waiting.pop(0)
                    self.running[job] = self._start(job, deadline - time.monotonic())
                    continue
                if time.monotonic() - packed > PACK_EVERY:
                    packed = time.monotonic()
                    self._pack(pack)
                    self._say(f"{len(compiling)} compile, {len(self.running) - len(compiling)} train")
                time.sleep(0.2)
        finally:
            self._end()
            self._pack(pack)

    def _compiling(self) -> list[Job]:
        """Those that have not said that they are compiled; what others had to say is printed once."""
        ready = {job for job in self.running if (self.work / job[0] / f"{job[1]}.ready").exists()}
        for job in ready - self.compiled:
            said = self._log(job).read_text(errors="replace").splitlines()
            self._say(f"{' '.join(job[:2])}: compiled. {said[-1] if said else ''}")
        self.compiled |= ready
        return [job for job in self.running if job not in ready]

    def _end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for job, process in self.running.items():
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
            self._say(f"{' '.join(job[:2])}: ended")

    def _pack(self, pack: Path | None) -> None:
        if pack is None:
            return
        pack_folder(self.out, pack)
        # What is inside of a model can be seen later. Its weights are by themselves: they may be too large to keep.
        if (weights := self.work / "weights").exists():
            pack_folder(weights, pack.with_name("weights.tar.gz"))

    def _say(self, what: str) -> None:
        runs = len(list(self.out.rglob("*_seed*.json")))
        print(f"{time.monotonic() - self.begin:.0f} s, {runs} runs: {what}", flush=True)

    def _start(self, job: Job, seconds: float) -> subprocess.Popen[bytes]:
        size, contestant, step = job
        (self.work / size / f"{contestant}.ready").unlink(missing_ok=True)
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__).parent / "learning.py"), step, "--shared", "--size", size]
        command += ["--contestants", contestant, "--out", str(self.out), "--work", str(self.work)]
        command += ["--minutes", f"{seconds / 60:.2f}", *self.arguments]
        with self._log(job).open("wb") as log:
            environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} | os.environ
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _note_ended(self) -> None:
        for job, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[job]
                code = process.returncode
                self._say(f"{' '.join(job[:2])}: {'done' if code == 0 else f'exit {code}'}")
                if code != 0:
                    print(self._log(job).read_text(errors="replace")[-2000:], flush=True)

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job[0]}_{job[1]}.log"


def pack_folder(folder: Path, target: Path) -> None:
    """Put ``folder`` into one compressed file, which is replaced at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w:gz", compresslevel=1) as archive:
        for path in sorted(folder.rglob("*")):
            # Other processes write beside: what is half written goes away under this hand.
            if path.is_file() and path.suffix != ".part" and path != target:
                archive.add(path, path.relative_to(folder.parent))
    part.replace(target)
