"""What to build: the configuration of a rewrite and the partition of layers into blocks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attnres_rewrite.errors import BlockPartitionError

BlocksOfStream = int | Literal["full", "auto"] | Sequence[int]
Blocks = BlocksOfStream | Mapping[str, BlocksOfStream]
_DEFAULT_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class AttnResConfig:
    """Configuration of Block Attention Residuals (arXiv:2603.15031).

    Attributes:
        blocks: Number N of blocks, ``"full"`` (every branch output its own block, the paper's Full
            AttnRes), ``"auto"`` (up to 8, as many as cost little in a model of this size), the number of layers
            in every block (``[2, 2, 4, 4]``), or a mapping from owner module name to any of these, for models with
            several streams.
        layers_per_block: Instead of ``blocks``: groups of this many layers, the last takes what remains.
        aggregation: ``"mean"`` (the paper: the weighted average of the sources), ``"sum"`` (n times that, which with
            zero queries is exactly the plain residual stream) or ``"add"`` (the plain residual stream plus the average,
            ``sum_i v_i + sum_i alpha_i v_i``, of which authors report more than of replacing it in pretrained models).
        eps: Epsilon of the RMS normalisation of the keys.
        scale: Factor on the logits, or ``"rsqrt_dim"`` for one over the square root of the width. The paper has none,
            so 1.0.
        key_gain: Whether each site learns a gain ``[D]`` on its normalised keys.
        schedule: How the sites are evaluated: ``"per_read"`` (one fused pass per read), ``"two_phase"`` (the reads of a
            block share one pass over the complete blocks, the paper's section 4; equal up to rounding), or ``"auto"``:
            in two phases where Inductor compiles a graph for more than a few tokens, read by read elsewhere.
        streams: Names of the owner modules whose streams are rewritten, or one name; ``None`` means all.
        leftovers: What becomes of sublayers that are on no stream and in no branch of one: ``"refuse"`` (the model) or
            ``"plain"`` (they keep their plain residuals, and what there are streams of is rewritten).
        sublayers_per_block: Instead of ``blocks`` and ``layers_per_block``: blocks of this many branch outputs, which
            may end within a layer; the last takes what remains. 1 is ``blocks="full"``.
        compile_layers: ``"inline"`` (the compiler sees every layer), ``"once"`` (layers that are computed alike are
            compiled once and called, which compiles faster and keeps kernels from fusing across their borders; those
            for which it might change a number stay inline, and the log says why), or ``"auto"``: once where Inductor
            compiles, for a CPU, many layers of so much data that a step is slower by about a hundredth at most.
        gate: Whether each site learns a factor ``[1]`` on what differs from the plain residual stream. It is 0 at
            first, where any model is exactly what it was, whatever the aggregation and the queries.
        value_norm: Whether the sources are mixed as they are compared, divided by their RMS (and without the key gain),
            as in transformers' Inkling2. Such a model does not start as it was, unless it has a gate.

    Raises:
        BlockPartitionError: ``blocks``, ``layers_per_block`` or ``sublayers_per_block`` is not a positive integer, or
            more than one of them is given.
        ValueError: Another field has a value outside its range.
    """

    blocks: Blocks = _DEFAULT_BLOCKS
    layers_per_block: int | None = None
    aggregation: Literal["mean", "sum", "add"] = "mean"
    eps: float = 1e-6
    scale: float | Literal["rsqrt_dim"] = 1.0
    key_gain: bool = True
    schedule: Literal["auto", "per_read", "two_phase"] = "auto"
    streams: tuple[str, ...] | None = None
    leftovers: Literal["refuse", "plain"] = "refuse"
    sublayers_per_block: int | None = None
    compile_layers: Literal["auto", "inline", "once"] = "auto"
    gate: bool = False
    value_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _checked(self.blocks))
        for name in ("layers_per_block", "sublayers_per_block"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if len(named := self._groupings()) > 1:
            raise BlockPartitionError(f"{' and '.join(named)} both say how the layers are grouped: give one of them")
        choices = {
            "aggregation": ("mean", "sum", "add"),
            "schedule": ("auto", "per_read", "two_phase"),
            "leftovers": ("refuse", "plain"),
            "compile_layers": ("auto", "inline", "once"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not (_is_number(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be a number that is not negative, not {self.eps!r}")
        if not _is_number(self.scale) and self.scale != "rsqrt_dim":
            raise ValueError(f'scale must be a finite number or "rsqrt_dim", not {self.scale!r}')
        for name in ("key_gain", "gate", "value_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.value_norm and self.schedule == "two_phase":
            raise ValueError('value_norm is read by read: leave schedule at "auto"')
        if self.streams is not None:
            names = (self.streams,) if isinstance(self.streams, str) else tuple(self.streams)
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"streams must be names of modules, not {names!r}")
            object.__setattr__(self, "streams", names)

    def with_blocks(self, blocks: Blocks) -> AttnResConfig:
        """This configuration with ``blocks``, which it must not have settled itself.

        Raises:
            BlockPartitionError: It names other blocks, or layers or sublayers per block.
        """
        blocks = _checked(blocks)
        named = self._groupings()
        if not named or named == [f"{blocks=!r}"]:
            return dataclasses.replace(self, blocks=blocks)
        raise BlockPartitionError(f"{blocks=!r} was given, and config says {named[0]}: give one of them")

    def _groupings(self) -> list[str]:
        """The fields that were set to say how the layers are grouped, each with its value."""
        defaults = {"blocks": _DEFAULT_BLOCKS, "layers_per_block": None, "sublayers_per_block": None}
        values = {name: getattr(self, name) for name in defaults}
        return [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]

    @property
    def starts_plain(self) -> bool:
        """Whether with zero queries, and the gate at 0 if there is one, every read is the plain stream itself.

        Otherwise it is a multiple of that, which a norm takes out; or, with ``value_norm``, another mixture.
        """
        return self.gate or (self.aggregation == "sum" and not self.value_norm)

    @property
    def base(self) -> float:
        """What the coefficient of every source has beside its depth weight."""
        return 1.0 if self.aggregation == "add" else 0.0

    def scale_of(self, width: int) -> float:
        """The factor on the logits of a stream of ``width`` channels."""
        return width**-0.5 if isinstance(self.scale, str) else self.scale

    def blocks_of(self, owner: str) -> BlocksOfStream:
        """The blocks of the stream that the module ``owner`` holds: their number, or the layers in every one."""
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
        return cls(**fields)


def _checked(blocks: Blocks) -> Blocks:
    if isinstance(blocks, Mapping):
        return {name: _checked_blocks(one) for name, one in blocks.items()}
    return _checked_blocks(blocks)


def _checked_blocks(blocks: BlocksOfStream) -> BlocksOfStream:
    """``blocks`` of one stream, sizes as a tuple."""
    if blocks in ("full", "auto"):
        return blocks
    if isinstance(blocks, (list, tuple)) and blocks:
        for size in blocks:
            _check_count("the number of layers in a block", size)
        return tuple(blocks)
    _check_count("blocks", blocks)
    return blocks


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        extra = ', "full" or "auto"' if name == "blocks" else ""
        raise BlockPartitionError(f"{name} must be a positive integer{extra}, not {value!r}")


def partition_layers(
    layers: int, *, blocks: int | Sequence[int] | None = None, layers_per_block: int | None = None
) -> list[int]:
    """Sizes of the contiguous groups of whole layers, first to last.

    Args:
        layers: Number of layers of the stream.
        blocks: Exactly this many groups, whose sizes differ by at most one, the larger ones first; or the sizes.
        layers_per_block: Groups of this many layers; the last takes what remains.

    Raises:
        BlockPartitionError: More blocks (or layers in a block) are asked for than there are layers, or the sizes given
            are not those of all layers.
    """
    if layers_per_block is not None:
        if layers_per_block > layers:
            raise BlockPartitionError(
                f"layers_per_block={layers_per_block}, but the stream has only {layers} layers: choose at most {layers}"
            )
        full, rest = divmod(layers, layers_per_block)
        return [layers_per_block] * full + [rest] * (rest > 0)
    assert blocks is not None
    if not isinstance(blocks, int):
        if sum(blocks) != layers:
            raise BlockPartitionError(
                f"blocks={list(blocks)} are {sum(blocks)} layers, but the stream has {layers}: give sizes whose sum "
                f"is {layers}"
            )
        return list(blocks)
    if blocks > layers:
        default = f". {blocks} is the default: write rewrite(model, blocks={layers}), or fewer"
        raise BlockPartitionError(
            f"blocks={blocks}, but the stream has only {layers} layers and a block holds whole layers: "
            f'choose at most {layers}, or blocks="full" to make every branch output its own block'
            + (default if blocks == _DEFAULT_BLOCKS else "")
        )
    size, larger = divmod(layers, blocks)
    return [size + 1] * larger + [size] * (blocks - larger)
