"""Records the depth weights of a rewritten model while it runs.

The backend here is one function for all models: Dynamo holds on to every backend that it has seen, so this one must not
hold on to graphs. What it compiles returns the weights beside the outputs of the graph, and puts them where the thread
that asks for them looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.forms.anchor import Anchor
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.inspection.readers import Readers
from attnres_rewrite.ops import depth_weights
from attnres_rewrite.passes import GroupLayers, Site
from attnres_rewrite.streams import StreamPlan


@dataclasses.dataclass(frozen=True)
class ReadStream:
    """What a graph says of a stream whose weights are recorded.

    Attributes:
        path: The owner, as the graph calls it.
        name: The owner, as the model calls it that was rewritten.
        layers: For every block, the names of the layers of its branch outputs, as the graph calls them.
    """

    path: str
    name: str
    layers: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """What a graph says of one site.

    Attributes:
        stream: Number of its stream in the graph, from 0.
        number: Its own number in the stream, from 0.
        readers: Paths of the modules that read it.
        block: The block, from 1, that the readers are in; one more than there are for a read behind all blocks.
        parts: For every source, which part of the stream it is: 0 the root's, n that of block n. Block ``block`` is in
            progress.
    """

    stream: int
    number: int
    readers: tuple[str, ...]
    block: int
    parts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """The weights of one site in one call, ``[sources, tokens...]``, float32."""

    stream: ReadStream
    read: Read
    weights: Tensor


Records = dict[tuple[str, str, int, int], Record]
_here = threading.local()


@contextlib.contextmanager
def recording() -> Iterator[Records]:
    """Within the context every graph that :func:`record_weights` compiled puts its records into what is yielded."""
    before: Records | None = getattr(_here, "records", None)
    records: Records = {}
    _here.records = records
    try:
        yield records
    finally:
        _here.records = before


def record_weights(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend for ``torch.compile``: rewrites the graph and records the weights of its sites as it runs."""
    return _RecordingBackend()(module, inputs)


class _RecordingBackend(AttnResBackend):
    """For one graph."""

    def __init__(self) -> None:
        super().__init__(self._with_weights)
        self.streams: list[ReadStream] = []
        self.reads: list[Read] = []
        self.sites: list[Site] = []

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        # One node then has all the sources of its site.
        return dataclasses.replace(config, schedule="per_read")

    def planned(self, anchor: Anchor, plan: StreamPlan) -> None:
        readers = Readers(plan.stream)
        last = dict(zip(plan.block_of, plan.stream.branches, strict=True))
        for number, (branch, block) in enumerate(zip(plan.stream.branches, plan.block_of, strict=True)):
            # What reads the value after the last branch of a block is in the next one.
            complete = block + (branch is last[block])
            self.reads.append(Read(len(self.streams), number, readers.of(branch), complete + 1, ()))
        self.streams.append(ReadStream(anchor.path, anchor.spec.owner, _layers_of_blocks(plan)))

    def inserted(self, sites: list[Site]) -> None:
        self.sites = sites
        self.reads = [dataclasses.replace(r, parts=site.parts) for r, site in zip(self.reads, sites, strict=True)]

    def _with_weights(self, module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        graph = module.graph
        weights = []
        for site in self.sites:
            sources, query, gain, eps, scale, *_ = site.node.args
            with graph.inserting_after(site.node):
                given = (sources, query, gain), {"eps": eps, "scale": scale}
                weights.append(graph.call_function(depth_weights, *given))
        output = graph.output_node()
        own: Any = output.args[0]
        output.args = ((*own, *weights),)
        module.recompile()
        # What is kept should not hold on to the nodes of the graph by way of the sites.
        return _recorder(module.forward, len(own), list(self.streams), list(self.reads))


def _recorder(
    run: Callable[..., Any], outputs: int, streams: list[ReadStream], reads: list[Read]
) -> Callable[..., Any]:
    """``run``, which gives the weights of ``reads`` after so many outputs, as Dynamo calls it."""

    def recorded(*arguments: Any) -> Any:
        values = run(*arguments)
        records: Records | None = getattr(_here, "records", None)
        if records is not None:
            for read, weights in zip(reads, values[outputs:], strict=True):
                stream = streams[read.stream]
                # An owner that runs more than once in a call, between breaks, has the records of its last run.
                records[stream.path, stream.name, read.stream, read.number] = Record(stream, read, weights)
        return values[:outputs]

    return recorded


def _layers_of_blocks(plan: StreamPlan) -> tuple[tuple[str, ...], ...]:
    # The plan of a live model has its blocks alone, which were settled when it was rewritten.
    grouped: StreamPlan = GroupLayers()(plan.stream.root.graph.owning_module, plan.stream, AttnResConfig("full"))  # type: ignore[arg-type]
    layers: list[dict[str, None]] = [{} for _ in range(plan.blocks)]
    for branch, layer, block in zip(plan.stream.branches, grouped.layer_of, plan.block_of, strict=True):
        if branch.adds:
            layers[block][grouped.layers[layer]] = None
    return tuple(tuple(names) for names in layers)
