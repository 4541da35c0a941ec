"""What the demo trains, and for how long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the defaults take a few minutes on two CPU cores.

    Attributes:
        steps: Optimizer steps of each of the two models.
        blocks: Number N of blocks, ``"full"`` or ``"auto"``.
        device: ``"cpu"``, ``"cuda"`` and so on; ``"auto"`` is CUDA where there is a GPU.
        out: Folder for the plots, the ONNX model and the results.
        backend: What compiles both models: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        layers: Number of layers.
        width: D, the width of the residual stream; must be a multiple of ``heads``.
        heads: Number of attention heads.
        hidden: Width of the MLP.
        batch: Sequences in a batch.
        length: Bytes in a sequence.
        validation_batches: Batches over which the validation loss is taken.
        learning_rate: Peak of the learning rate, after a linear warm-up and before a cosine decay.
        weight_decay: Weight decay of the matrices; vectors and AttnRes parameters have none.
        seed: Seed of the initial weights and of the order of the data.
    """

    steps: int = 300
    blocks: int | Literal["full", "auto"] = 4
    device: str = "auto"
    out: Path = Path("attnres-demo")
    backend: str = "inductor"
    layers: int = 8
    width: int = 256
    heads: int = 8
    hidden: int = 512
    batch: int = 4
    length: int = 256
    validation_batches: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "width", "heads", "hidden", "batch", "length", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def resolve_device(self) -> torch.device:
        """The device that ``device`` means on this machine.

        Raises:
            ValueError: There is no such device, or PyTorch does not see it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return device

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, for JSON; without the folder."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
