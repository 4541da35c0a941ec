"""What is compared, and for how long."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

import torch

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig

Form = Literal["plain", "rewritten"]
Kind = Literal["training", "inference", "decode"]
FORMS: tuple[Form, ...] = ("plain", "rewritten")
# Fewer rounds than this say nothing, however short the time.
FEWEST_ROUNDS = 5

_DTYPES = ("float32", "bfloat16", "float16")
_COUNTS = ("batch", "length", "cached", "rounds", "threads")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """Settings of a comparison of a model with its rewritten form.

    Attributes:
        blocks, layers_per_block, aggregation, streams, schedule: As in :class:`attnres_rewrite.AttnResConfig`.
        batch: Sequences in a batch of tokens; ``None``: 2, or as the example inputs are.
        length: Tokens in a sequence; ``None``: 256, or as many as the model has positions for, or as the example
            inputs are.
        cached: Tokens in the key-value cache of a decode step; ``None``: as many as ``length``.
        rounds: Most rounds that are timed; a round is a step of each form.
        warmup: Rounds before them, of which the first compiles.
        seconds: Time to spend on the rounds of all kinds of step together; ``None``: as long as they take. At least
            five are timed in any case.
        device: ``"cpu"``, ``"cuda"`` and so on; ``"auto"`` is the accelerator where there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None``: as the model comes.
        threads: CPU threads; ``None``: as PyTorch chooses.
        backend: What compiles both forms.
        training: Whether to time training steps: forward, loss, backward, AdamW.
        inference: Whether to time forwards without gradients.
        decode: Whether to time one token a sequence with a key-value cache.
        seed: Seed of weights, queries and inputs.

    Raises:
        ValueError: A field has a value outside its range.
        BlockPartitionError: ``blocks`` is not a positive integer.
    """

    blocks: int | Literal["full", "auto"] | Sequence[int] = 8
    layers_per_block: int | None = None
    aggregation: str = "mean"
    streams: Sequence[str] | None = None
    schedule: str = "auto"
    batch: int | None = None
    length: int | None = None
    cached: int | None = None
    rounds: int = 20
    warmup: int = 3
    seconds: float | None = None
    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    backend: str = "inductor"
    training: bool = True
    inference: bool = True
    decode: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.warmup < 1:
            raise ValueError(f"warmup must be at least 1, not {self.warmup}: the first round compiles")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if not _compat.is_backend(self.backend):
            raise ValueError(f"there is no backend {self.backend!r}: torch.compiler.list_backends() lists them")
        if not self.kinds:
            raise ValueError("nothing to measure: choose at least one of training, inference and decode")
        self.config()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of step that are wanted."""
        kinds: tuple[Kind, ...] = ("training", "inference", "decode")
        return tuple(kind for kind in kinds if getattr(self, kind))

    def config(self) -> AttnResConfig:
        """The configuration of the rewrite."""
        fields: Any = {field.name for field in dataclasses.fields(AttnResConfig)}
        # What values there are is for the configuration to say.
        return AttnResConfig(**{name: value for name, value in vars(self).items() if name in fields})

    def resolve_device(self) -> torch.device:
        """The device that ``device`` means on this machine.

        Raises:
            ValueError: There is no such device, or PyTorch does not see it.
        """
        if self.device == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return device

    def to_json(self) -> str:
        """These settings as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BenchSettings:
        """The settings that :meth:`to_json` wrote."""
        return cls(**json.loads(text))
