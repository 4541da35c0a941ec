"""Real text without a download: the source of the Python standard library on this machine, as bytes."""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Installed packages are not the standard library, and tests hold more tables than text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VALIDATION_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation text, from different files.

    Attributes:
        train: Bytes of the training files, uint8 ``[n]``, a zero byte after each file.
        validation: Likewise for the validation files.
        files: Number of files in both.
    """

    train: Tensor
    validation: Tensor
    files: int

    def training_batches(self, batch: int, length: int, seed: int) -> Iterator[Tensor]:
        """Endless random windows, int64 ``[batch, length]``; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(0, len(self.train) - length, (batch,), generator=generator)
            yield _windows(self.train, starts, length)

    def validation_batches(self, count: int, batch: int, length: int) -> list[Tensor]:
        """``count`` batches of windows that lie evenly over the validation text, int64 ``[batch, length]``."""
        starts = torch.linspace(0, len(self.validation) - length, count * batch).long()
        return [_windows(self.validation, part, length) for part in starts.split(batch)]


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()


def standard_library(root: Path | None = None) -> Corpus:
    """The ``*.py`` files of the standard library in the order of their names, every twentieth for validation.

    Args:
        root: Folder to read instead of the standard library's.

    Raises:
        FileNotFoundError: The folder holds too few source files, as in a zipped installation.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    inside = ((path, path.relative_to(root)) for path in root.rglob("*.py"))
    names = sorted(name.as_posix() for path, name in inside if not LEFT_OUT & set(name.parts) and path.is_file())
    if len(names) < 2:
        raise FileNotFoundError(f"no Python sources to train on in {root}: is the standard library zipped?")
    held_out = names[VALIDATION_EVERY - 1 :: VALIDATION_EVERY] or names[-1:]
    kept = [name for name in names if name not in set(held_out)]
    return Corpus(_read(root, kept), _read(root, held_out), len(names))


def _read(root: Path, names: list[str]) -> Tensor:
    text = b"".join((root / name).read_bytes() + b"\0" for name in names)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
