"""What Attention Residuals cost a model on several processes, reckoned without one of them.

The sums of the blocks are what a rewritten model holds and sends more than a plain one. How many there are where, and
which cross from one pipeline stage to the next, follows from the layers, the blocks and the mesh; the names of the
dimensions of a mesh are in :data:`DIMENSIONS`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from attnres_rewrite.config import AttnResConfig, Blocks, partition_layers
from attnres_rewrite.distributed.model_size import ModelSize
from attnres_rewrite.distributed.plan_table import table_of
from attnres_rewrite.errors import BlockPartitionError, MeshError
from attnres_rewrite.passes.blocks_for_size import blocks_for_size

# Data parallel with whole weights, with sharded ones, tensor, context, expert and pipeline parallel.
DIMENSIONS = ("dp", "fsdp", "tp", "cp", "ep", "pp")
_ALIASES = {"dp_replicate": "dp", "replicate": "dp", "data": "dp", "dp_shard": "fsdp", "shard": "fsdp"}
_ALIASES |= {"tensor": "tp", "model": "tp", "context": "cp", "expert": "ep", "pipeline": "pp", "stage": "pp"}


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """What each process of one pipeline rank has; with one rank, every process.

    Attributes:
        layers: Number of layers.
        parameters: Number of parameters that it holds, those of the sites among them.
        site_parameters: Number of parameters of the sites that it holds: pseudo-queries and key gains.
        block_sums: Most sums of finished blocks, the embedding among them, that a read of its layers has as sources.
        block_sum_bytes: Their bytes for the tokens of one prefill, or of one chunk of it.
    """

    layers: int
    parameters: int
    site_parameters: int
    block_sums: int
    block_sum_bytes: int


@dataclasses.dataclass(frozen=True)
class Transition:
    """What crosses from one virtual stage of a pipeline to the next, in the forward; the backward sends as many back.

    All are bytes a token.

    Attributes:
        source: Pipeline rank that sends.
        target: Pipeline rank that receives.
        plain: The residual stream of the plain model.
        naive: Every block sum so far, with the running sum of a block that goes on.
        cached: The block sums that the receiver has not seen, with the running sum (the paper's section 4.1).
    """

    source: int
    target: int
    plain: int
    naive: int
    cached: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` gives; ``print`` shows it as a table.

    Attributes:
        size: The model.
        blocks: Number of layers in every block.
        mesh: Size of every dimension.
        virtual_stages: V, the number of stages of each pipeline rank.
        tokens: Tokens of a prefill that a process holds block sums of: its share, or that of a chunk.
        bytes_per_value: Bytes of one number of the stream.
        ranks: One entry a pipeline rank.
        transitions: One entry for each of the P·V - 1 transitions, first to last.
    """

    size: ModelSize
    blocks: tuple[int, ...]
    mesh: Mapping[str, int]
    virtual_stages: int
    tokens: int
    bytes_per_value: int
    ranks: tuple[RankPlan, ...]
    transitions: tuple[Transition, ...]

    @property
    def block_sum_bytes(self) -> int:
        """The most bytes of block sums that a process holds."""
        return max(rank.block_sum_bytes for rank in self.ranks)

    @property
    def sent_more(self) -> dict[str, int]:
        """Bytes a token that cross stages beyond the plain model's in the forward, ``"naive"`` and ``"cached"``."""
        return {way: sum(getattr(one, way) - one.plain for one in self.transitions) for way in ("naive", "cached")}

    @property
    def memory_traffic(self) -> dict[str, float]:
        """Bytes a token that the residual connections of the whole model read and write, in the forward.

        As the paper's table 1 counts them, for each sublayer: 3d plain, and (N/S + 5)d in two phases, with N blocks of
        S sublayers.
        """
        sublayers = self.size.layers * self.size.sublayers
        unit = sublayers * self.size.width * self.bytes_per_value
        in_a_block = sublayers / len(self.blocks)
        return {"plain": 3.0 * unit, "two_phase": (len(self.blocks) / in_a_block + 5) * unit}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return {
            **dataclasses.asdict(dataclasses.replace(self, mesh=dict(self.mesh))),
            "block_sum_bytes": self.block_sum_bytes,
            "sent_more": self.sent_more,
            "memory_traffic": self.memory_traffic,
        }

    def __str__(self) -> str:
        return table_of(self)


def plan(
    model: Any,
    mesh: Any = None,
    blocks: Blocks | None = None,
    *,
    config: AttnResConfig | None = None,
    tokens: int = 128 * 1024,
    chunk: int | None = None,
    sequence_sharded: bool = False,
    virtual_stages: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """What Block Attention Residuals cost ``model`` on the processes of ``mesh``. Nothing is run or traced.

    Layers are dealt to pipeline stages as evenly as they go, the first stages get one more; what is outside the layers
    counts half for the first rank and half for the last one, as an embedding and a head of one size.

    Args:
        model: An ``nn.Module``, best on the meta device; a configuration of transformers, of which one is made there;
            or a :class:`ModelSize`.
        mesh: A ``DeviceMesh`` with named dimensions, or a mapping of names to sizes, for which no process group is
            needed; ``None`` is one process.
        blocks: As for :func:`attnres_rewrite.rewrite`, of one stream; by default those that a rewritten model has.
        config: Likewise.
        tokens: Tokens of a prefill: sequences times their length.
        chunk: Tokens that are prefilled at a time, if not all.
        sequence_sharded: Whether the stream is sharded over its tokens in the tensor parallel dimension, as in sequence
            parallel. In the context parallel dimension it always is.
        virtual_stages: V, stages of each pipeline rank, as in interleaved schedules.
        dtype: Dtype of the stream.

    Returns:
        The plan.

    Raises:
        MeshError: The mesh has a dimension that is not known, or more pipeline stages than the model has layers.
        BlockPartitionError: The layers cannot be grouped as asked.
        TypeError: ``model`` or ``mesh`` is of another kind.
    """
    size, sizes = ModelSize.of(model), _sizes_of(mesh)
    if blocks is None and config is None:
        blocks = size.blocks
    chosen = config or AttnResConfig()
    layers_of_block = _layers_of_blocks(chosen if blocks is None else chosen.with_blocks(blocks), size)
    counts = _deal(size.layers, sizes["pp"], virtual_stages)
    held = tokens if chunk is None else min(chunk, tokens)
    held = math.ceil(held / (sizes["cp"] * (sizes["tp"] if sequence_sharded else 1)))
    one = size.width * dtype.itemsize
    per_site = size.width * (2 if chosen.key_gain else 1) + chosen.gate
    stages = list(_Stage.of(counts, layers_of_block, size, per_site))
    ranks = tuple(_rank(stages[rank :: sizes["pp"]], rank, size, sizes, held * one) for rank in range(sizes["pp"]))
    return Plan(
        size,
        tuple(layers_of_block),
        sizes,
        virtual_stages,
        held,
        dtype.itemsize,
        ranks,
        tuple(_transitions(stages, sizes["pp"], one)),
    )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One virtual stage.

    Attributes:
        layers: Its layers, as numbers.
        sums: Finished sums that its last layer reads; 0 is the embedding, and n that of block n.
        finished: Those that there are when it is done.
        running: Whether a block goes on in the next stage.
        site_parameters: Number of parameters of its sites.
    """

    layers: range
    sums: int
    finished: int
    running: bool
    site_parameters: int

    @classmethod
    def of(cls, counts: Sequence[int], blocks: Sequence[int], size: ModelSize, per_site: int) -> Iterator[_Stage]:
        ends, start = list(itertools.accumulate(blocks)), 0
        for count in counts:
            layers = range(start, start + count)
            done = sum(end <= layers.stop for end in ends)
            # The first read of all has none, the read before the last norm has one.
            sites = count * size.sublayers - (start == 0) + (layers.stop == size.layers)
            yield cls(
                layers,
                sums=1 + sum(end < layers.stop for end in ends),
                finished=1 + done,
                running=layers.stop not in ends,
                site_parameters=sites * per_site,
            )
            start = layers.stop


def _rank(stages: Sequence[_Stage], rank: int, size: ModelSize, mesh: Mapping[str, int], sum_bytes: int) -> RankPlan:
    """What a process has of the stages of its pipeline rank."""
    # Vectors are whole in each tensor parallel process, matrices and experts are not.
    split = {"vectors": 1, "matrices": mesh["tp"], "experts": mesh["tp"] * mesh["ep"]}
    layers = sum(len(stage.layers) for stage in stages)
    sites = sum(stage.site_parameters for stage in stages)
    # The first rank has the embedding and the last one the head.
    ends = ((rank == 0) + (rank == mesh["pp"] - 1)) / 2
    held = sites + sum(
        (layers * getattr(size.layer, kind) + ends * getattr(size.outside, kind)) / parts
        for kind, parts in split.items()
    )
    sums = max(stage.sums for stage in stages)
    return RankPlan(
        layers,
        math.ceil(held / mesh["fsdp"]),
        math.ceil(sites / mesh["fsdp"]),
        sums,
        sums * sum_bytes,
    )


def _transitions(stages: Sequence[_Stage], ranks: int, one: int) -> Iterator[Transition]:
    """What crosses between stages on ``ranks`` processes, of which none receives or keeps a sum twice."""
    known = [0] * ranks
    for index, (stage, _) in enumerate(itertools.pairwise(stages)):
        source, target = index % ranks, (index + 1) % ranks
        known[source] = max(known[source], stage.finished)
        crossing = source != target
        new = stage.finished - known[target]
        known[target] = stage.finished
        yield Transition(
            source,
            target,
            plain=one * crossing,
            naive=(stage.finished + stage.running) * one * crossing,
            cached=(new + stage.running) * one * crossing,
        )


def _deal(layers: int, ranks: int, virtual_stages: int) -> list[int]:
    """Numbers of layers of all virtual stages, in order."""
    stages = ranks * virtual_stages
    if virtual_stages < 1 or stages > layers:
        raise MeshError(
            f"{ranks} pipeline ranks of {virtual_stages} stages each are {stages} stages, and the model has {layers} "
            f"layers: choose at least 1 and at most {layers} stages in all"
        )
    return partition_layers(layers, blocks=stages)


def _layers_of_blocks(config: AttnResConfig, size: ModelSize) -> list[int]:
    if config.sublayers_per_block is not None or config.blocks == "full" or isinstance(config.blocks, Mapping):
        raise BlockPartitionError(
            "plan reckons with blocks of whole layers of one stream: give blocks a number or sizes, or "
            "AttnResConfig(layers_per_block=...)"
        )
    if config.layers_per_block is not None:
        return partition_layers(size.layers, layers_per_block=config.layers_per_block)
    blocks = config.blocks
    if blocks == "auto":
        weights = round(size.layers * (size.layer.matrices + size.layer.experts))
        blocks = blocks_for_size([size.sublayers] * size.layers, size.width, weights).blocks
    return partition_layers(size.layers, blocks=blocks)


def _sizes_of(mesh: Any) -> dict[str, int]:
    """Size of every dimension that there may be."""
    if isinstance(mesh, Mapping):
        given = dict(mesh)
    elif mesh is None:
        given = {}
    elif hasattr(mesh, "mesh_dim_names"):
        given = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=bool(mesh.mesh_dim_names)))
        if not given:
            raise MeshError(f"the dimensions of this mesh have no names: make it with mesh_dim_names, of {DIMENSIONS}")
    else:
        raise TypeError(f"mesh is a DeviceMesh or a mapping of names to sizes, not a {type(mesh).__name__}")
    sizes = dict.fromkeys(DIMENSIONS, 1)
    for name, number in given.items():
        known = _ALIASES.get(name, name)
        if known not in sizes:
            raise MeshError(f"the mesh has a dimension {name!r}: known are {[*DIMENSIONS, *_ALIASES]}")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise MeshError(f"dimension {name!r} of the mesh has {number!r} processes: give a positive integer")
        sizes[known] *= number
    return sizes
