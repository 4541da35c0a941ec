"""Who learns in `benchmarks/learning.py`, how long, and from what text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite import AttnResConfig
from attnres_rewrite.demo.corpus import Corpus, standard_library

VOCABULARY = 256
STAGES = ("scratch", "retrofit")
# None is a model that is not rewritten.
CONTESTANTS: dict[str, AttnResConfig | None] = {
    "plain": None,
    "mean-2": AttnResConfig(blocks=2),
    "mean-4": AttnResConfig(blocks=4),
    "mean-8": AttnResConfig(blocks=8),
    "full": AttnResConfig(blocks="full"),
    "sum-8": AttnResConfig(blocks=8, aggregation="sum"),
    "add-8": AttnResConfig(blocks=8, aggregation="add"),
    "mean-8-gate": AttnResConfig(blocks=8, gate=True),
    "sum-8-gate": AttnResConfig(blocks=8, aggregation="sum", gate=True),
    "add-8-gate": AttnResConfig(blocks=8, aggregation="add", gate=True),
    "mhc-4": None,
}
# Manifold-constrained hyper-connections, by the number of streams; from a package that is asked for then only.
STREAMS = {"mhc-4": 4}


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama over bytes, and how long it learns: ``steps`` of ``batch`` windows of ``length`` bytes.

    On a GPU up to ``at_once`` runs share it, which one alone would not fill.
    """

    layers: int
    width: int
    batch: int
    length: int
    steps: int
    held_out: int = 128
    backend: str = "inductor"
    at_once: int = 6
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    extra_rates: int = 3
    seeds: int = 3

    @property
    def tokens(self) -> int:
        """Bytes trained on."""
        return self.steps * self.batch * self.length


SIZES = {
    "quick": Size(2, 32, 2, 32, steps=4, held_out=4, backend="eager", rates=(2e-3,), extra_rates=0, seeds=2),
    # For a CPU: a minute a run, and several for the larger.
    "0.06M": Size(layers=8, width=24, batch=16, length=128, steps=160, rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2), seeds=5),
    "0.1M": Size(layers=8, width=32, batch=16, length=128, steps=260, rates=(2e-3, 4e-3, 8e-3, 1.6e-2), seeds=5),
    "0.25M": Size(layers=8, width=48, batch=16, length=128, steps=600),
    "0.4M": Size(layers=8, width=64, batch=16, length=128, steps=1000),
    "1.6M": Size(layers=8, width=128, batch=16, length=128, steps=2000),
    # For a GPU: larger batches, and fewer tokens than the next.
    "5M-short": Size(layers=12, width=192, batch=32, length=128, steps=1500, rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "5M": Size(layers=12, width=192, batch=16, length=128, steps=4000, rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "50M": Size(layers=16, width=512, batch=64, length=512, steps=8000, rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides the numbers of a run: nothing else does, but the versions and the machine that its file names.

    Attributes:
        size: A key of ``SIZES``.
        contestant: A key of ``CONTESTANTS``.
        rate: The learning rate.
        seed: Of the weights and of the order of the text.
        stage: ``"scratch"``, or ``"retrofit"``: a trained plain model goes on with other text.
        attnres_rate: The learning rate of the sites, as a multiple.
    """

    size: str
    contestant: str
    rate: float
    seed: int
    stage: str = "scratch"
    attnres_rate: float = 1.0

    @property
    def path(self) -> Path:
        """Its file, below the folder of results."""
        folder = Path(self.size) if self.stage == "scratch" else Path(self.size) / self.stage
        times = "" if self.attnres_rate == 1.0 else f"x{self.attnres_rate:g}"
        return folder / f"{self.contestant}_lr{self.rate:g}{times}_seed{self.seed}.json"

    @property
    def shape(self) -> Size:
        """The model and how long it learns: half as long where it goes on."""
        size = SIZES[self.size]
        return size if self.stage == "scratch" else dataclasses.replace(size, steps=size.steps // 2)


class Text:
    """Training text, and two parts that are held out, of other files: one to choose by, one to report."""

    def __init__(self, corpus: Corpus) -> None:
        held_out = corpus.validation
        # A zero byte ends every file.
        ends = (held_out == 0).nonzero().flatten()
        middle = int(ends[len(ends) // 2]) + 1
        self.train = corpus
        self.validation = dataclasses.replace(corpus, validation=held_out[:middle])
        self.test = dataclasses.replace(corpus, validation=held_out[middle:])
        self._digest = hashlib.sha256(torch.cat([corpus.train, held_out]).numpy()).hexdigest()[:16]
        self._windows: dict[tuple[int, ...], Tensor] = {}

    def windows(self, size: Size, seed: int) -> Tensor:
        """All of a run from the training text, uint8 ``[steps, batch, length]``: the same for every contestant."""
        key = (size.steps, size.batch, size.length, seed)
        if key not in self._windows:
            found = torch.empty(key[:3], dtype=torch.uint8)
            for step, windows in enumerate(found):
                first = 1_000_003 * (seed + 1) + step
                windows.copy_(next(self.train.training_batches(size.batch, size.length, first)))
            self._windows = {key: found} if found.numel() > 1e8 else self._windows | {key: found}
        return self._windows[key]

    def digest(self) -> str:
        """Says whether two runs had the same text."""
        return self._digest


def read_text(stage: str = "scratch") -> Text:
    """The standard library; for a model that goes on, the source of PyTorch.

    (Not the tests of the standard library: some systems install a few of them only.)
    """
    return Text(standard_library(None if stage == "scratch" else Path(torch.__file__).parent))


def finished(folder: Path, size: str, stage: str = "scratch") -> Iterator[dict[str, Any]]:
    """The runs of ``size`` that are written."""
    for path in sorted((folder / Run(size, "plain", 1.0, 0, stage).path).parent.glob("*_seed*.json")):
        yield json.loads(path.read_text())
