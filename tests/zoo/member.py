"""What the zoo knows of one architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import attnres_rewrite as ar

Inputs = Mapping[str, Any] | tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The model is rewritten.

    Attributes:
        streams: For every owner module, the number of branch outputs of each of its streams.
        layers: Layers of each stream, where that is not 4.
        dtype: What the checks run in; float32 where the model does not run in float64.
        tolerance: Allowed relative error, where the model itself computes in a lower precision than ``dtype``.
        untrainable: What is said when the model is trained, where its own code cannot be captured then.
        named: Whether the configuration names the owners in ``streams``, and leaves what else there is plain.
        idle: Number of sites whose read the model throws away, so that they get no gradient.
        sizes: Two (batch, length) pairs that it is run on.
        leftovers: What the configuration says of sublayers that are on no stream.
    """

    streams: Mapping[str, int | tuple[int, ...]]
    layers: int | Mapping[str, int | tuple[int, ...]] = 4
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    untrainable: str = ""
    named: bool = False
    idle: int = 0
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 6), (3, 5))
    leftovers: Literal["refuse", "plain"] = "refuse"


@dataclasses.dataclass(frozen=True)
class Refused:
    """The model is left as it is, with an error.

    Attributes:
        reason: A short name of why, for the table.
        says: What the message must contain of the reason.
        line: The line of the model's source that the message must quote.
        error: The type of the error.
    """

    reason: str
    says: str
    line: str
    error: type[ar.AttnResError] = ar.UnsupportedResidualError

    def __post_init__(self) -> None:
        if not (self.reason and self.says and self.line):
            raise ValueError(f"an empty expectation is met by any message: {self}")


def post_norm(line: str) -> Refused:
    """A norm on the stream itself."""
    return Refused("post-norm", "post-norm: a norm sits on the residual stream itself", line)


def breaks(says: str, line: str) -> Refused:
    """A graph break between the layers."""
    return Refused("graph break", says, line, ar.GraphBreakError)


def changed(reason: str, line: str) -> Refused:
    """The stream is not passed on as it is, and what changes it is no norm."""
    return Refused(reason, "the residual stream is changed between its adds by something that is no scale", line)


@dataclasses.dataclass(frozen=True)
class Unbuildable:
    """No tiny model of this kind can be made, or none that runs.

    Attributes:
        reason: Why, in a few words, for the table.
        says: What is raised when it is tried contains this.
    """

    reason: str
    says: str


@dataclasses.dataclass(frozen=True)
class Member:
    """One architecture.

    Attributes:
        name: Unique in the zoo.
        family: The heading that it is counted under.
        make: Makes a tiny one with random weights.
        inputs: What it is called with, for a batch and a length.
        outcome: What must come of rewriting it.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    outcome: Accepted | Refused | Unbuildable


def token_ids(batch: int, length: int, low: int = 3, high: int = 96) -> Tensor:
    """Token ids that are no special tokens; the same ones for the same sizes."""
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def noise(*shape: int) -> Tensor:
    """Standard normal numbers; the same ones for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
