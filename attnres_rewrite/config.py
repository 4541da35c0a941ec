"""What to build: the configuration of a rewrite and the partition of layers into blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from attnres_rewrite.errors import BlockPartitionError

Blocks = int | Literal["full"] | Mapping[str, int | Literal["full"]]


@dataclasses.dataclass(frozen=True)
class AttnResConfig:
    """Configuration of Block Attention Residuals (arXiv:2603.15031).

    Attributes:
        blocks: Number N of blocks, ``"full"`` (every branch output its own block, the paper's Full
            AttnRes), or a mapping from owner module name to either, for models with several streams.
        layers_per_block: Instead of ``blocks``: groups of this many layers, the last takes what remains.
        aggregation: ``"mean"`` (the paper: the weighted average of the sources) or ``"sum"`` (n times
            that, which with zero queries is exactly the plain residual stream).
        eps: Epsilon of the RMS normalisation of the keys.
        scale: Factor on the logits. The paper has none, so 1.0.
        key_gain: Whether each site learns a gain ``[D]`` on its normalised keys.
        schedule: How the sites are evaluated: ``"per_read"`` (one fused pass per read), ``"two_phase"`` (the reads of a
            block share one pass over the complete blocks, the paper's section 4; equal up to rounding), or ``"auto"``:
            in two phases where Inductor compiles a graph for more than a few tokens, read by read elsewhere.
        streams: Names of the owner modules whose streams are rewritten; ``None`` means all.
        leftovers: What becomes of sublayers that are on no stream and in no branch of one: ``"refuse"`` (the model) or
            ``"plain"`` (they keep their plain residuals, and what there are streams of is rewritten).

    Raises:
        BlockPartitionError: ``blocks`` or ``layers_per_block`` is not a positive integer.
        ValueError: Another field has a value outside its range.
    """

    blocks: Blocks = 8
    layers_per_block: int | None = None
    aggregation: Literal["mean", "sum"] = "mean"
    eps: float = 1e-6
    scale: float = 1.0
    key_gain: bool = True
    schedule: Literal["auto", "per_read", "two_phase"] = "auto"
    streams: tuple[str, ...] | None = None
    leftovers: Literal["refuse", "plain"] = "refuse"

    def __post_init__(self) -> None:
        each = self.blocks.values() if isinstance(self.blocks, Mapping) else [self.blocks]
        for blocks in each:
            if blocks != "full":
                _check_count("blocks", blocks)
        if self.layers_per_block is not None:
            _check_count("layers_per_block", self.layers_per_block)
        choices = {
            "aggregation": ("mean", "sum"),
            "schedule": ("auto", "per_read", "two_phase"),
            "leftovers": ("refuse", "plain"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, not {self.eps!r}")
        if self.streams is not None:
            object.__setattr__(self, "streams", tuple(self.streams))

    def blocks_of(self, owner: str) -> int | Literal["full"]:
        """The number of blocks of the stream that the module ``owner`` holds."""
        if not isinstance(self.blocks, Mapping):
            return self.blocks
        if owner not in self.blocks:
            raise BlockPartitionError(
                f"blocks names {sorted(self.blocks)}, but a stream was found in module {owner!r}: give it "
                f"a number of blocks too, or name the streams to rewrite in AttnResConfig(streams=...)"
            )
        return self.blocks[owner]

    def to_json(self) -> str:
        """This configuration as one line of JSON."""
        fields = dataclasses.asdict(self)
        if isinstance(self.blocks, Mapping):
            fields["blocks"] = dict(self.blocks)
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AttnResConfig:
        """The configuration that :meth:`to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        if fields["streams"] is not None:
            fields["streams"] = tuple(fields["streams"])
        return cls(**fields)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        extra = ', or "full"' if name == "blocks" else ""
        raise BlockPartitionError(f"{name} must be a positive integer{extra}, not {value!r}")


def partition_layers(layers: int, *, blocks: int | None = None, layers_per_block: int | None = None) -> list[int]:
    """Sizes of the contiguous groups of whole layers, first to last.

    Args:
        layers: Number of layers of the stream.
        blocks: Exactly this many groups, whose sizes differ by at most one, the larger ones first.
        layers_per_block: Groups of this many layers; the last takes what remains.

    Raises:
        BlockPartitionError: More blocks (or layers in a block) are asked for than there are layers.
    """
    if layers_per_block is not None:
        if layers_per_block > layers:
            raise BlockPartitionError(
                f"layers_per_block={layers_per_block}, but the stream has only {layers} layers: choose at most {layers}"
            )
        full, rest = divmod(layers, layers_per_block)
        return [layers_per_block] * full + [rest] * (rest > 0)
    assert blocks is not None
    if blocks > layers:
        raise BlockPartitionError(
            f"blocks={blocks}, but the stream has only {layers} layers and a block holds whole layers: "
            f'choose at most {layers}, or blocks="full" to make every branch output its own block'
        )
    size, larger = divmod(layers, blocks)
    return [size + 1] * larger + [size] * (blocks - larger)
