"""The depth weights of a rewritten model: how much each site attends to each source."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.capture.inputs import ExampleInputs, as_it_was, example_call, without_traces
from attnres_rewrite.errors import GraphBreakError
from attnres_rewrite.forms.live import require_live, run_through
from attnres_rewrite.inspection.depth_recording import Record, record_weights, recording


@dataclasses.dataclass(frozen=True)
class DepthStream:
    """A residual stream that the sites of a :class:`DepthAttention` read.

    Attributes:
        owner: The module that holds it; ``""`` is the model.
        blocks: For every block n, from 1, the names of the layers whose outputs the source ``b_n`` is the sum of.
    """

    owner: str
    blocks: list[list[str]]


@dataclasses.dataclass(frozen=True)
class DepthAttention:
    """Depth weights alpha of every site (paper, Block AttnRes: the softmax over the sources).

    Attributes:
        sites: For every site, by depth, the module that reads it: a sublayer, such as ``model.layers.3.mlp``, and not
            its norm; where the sublayers of a layer read the same value, the layer. The last read of a stream has the
            name of the last norm.
        sources: Names of the columns: ``b_0`` to ``b_N``, and ``partial`` for the block in progress.
        weights: ``[sites, sources]`` float32 on the CPU, the mean over all tokens, those that pad a batch included; NaN
            where a site does not have the source. Each row sums to one.
        token_weights: ``[sites, sources, tokens...]`` float32 on the CPU, the weights for every token. ``tokens...``
            are the dimensions of the stream without its width, ``[batch, length]`` as a rule; over ``sources``
            the weights sum to one. NaN where a site does not have the source. Streams of different lengths (encoder
            and decoder) are in one tensor, of the larger size in each dimension, aligned at the last one: NaN, too,
            where a stream does not have the token.
        block_of: For every site, the number n, from 1, of the block that its reader is in; one more than there are
            blocks for what reads behind the last one.
        stream_of: For every site, the index of its stream in ``streams``.
        streams: The residual streams.
    """

    sites: list[str]
    sources: list[str]
    weights: Tensor
    token_weights: Tensor
    block_of: list[int]
    stream_of: list[int]
    streams: list[DepthStream]

    @property
    def labels(self) -> list[str]:
        """The names of the sites for people: without that of the owner, if there is one stream alone."""
        prefix = f"{self.streams[0].owner}." if len(self.streams) == 1 else ""
        return [name.removeprefix(prefix) for name in self.sites]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """What the sites are grouped by, in order: the name of the block that the readers are in, and how many are."""
        keys = itertools.groupby(zip(self.stream_of, self.block_of, strict=True))
        return [(self._name_of_block(stream, block), len(list(sites))) for (stream, block), sites in keys]

    def _name_of_block(self, stream: int, block: int) -> str:
        name = f"block {block}" if block <= len(self.streams[stream].blocks) else "last"
        return f"{self.streams[stream].owner} {name}".strip() if len(self.streams) > 1 else name

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights of single tokens, for JSON; ``None`` for a source that a site lacks."""
        rows = [[None if value != value else value for value in row] for row in self.weights.tolist()]
        return {
            "sites": self.sites,
            "sources": self.sources,
            "weights": rows,
            "block_of": self.block_of,
            "stream_of": self.stream_of,
            "streams": [dataclasses.asdict(stream) for stream in self.streams],
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write what :meth:`to_dict` gives to a JSON file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a heatmap of the mean weights, sites by sources, to an image file; blocks are set apart by lines.

        Raises:
            MissingPackageError: matplotlib is not installed (extra ``plot``).
        """
        from attnres_rewrite.inspection.depth_plot import draw

        draw(self, path)

    def to_html(self, path: str | PathLike[str], *, tokens: Sequence[str] | None = None, max_tokens: int = 512) -> None:
        """Write one page that needs nothing else, no network either: a heatmap, and a slider over the tokens.

        Args:
            path: The file to write.
            tokens: Names of the tokens to show, such as the pieces of text that they stand for, in order: sequence by
                sequence. Fewer than there are name the first ones.
            max_tokens: The page holds the weights of the first so many tokens, with five bytes a weight; the mean it
                shows is that over all.

        Raises:
            ValueError: There are more names than tokens, or ``max_tokens`` is negative.
        """
        from attnres_rewrite.inspection.depth_page import write_page

        write_page(self, path, tokens or (), max_tokens)


def depth_attention(model: nn.Module, example_inputs: ExampleInputs | None = None) -> DepthAttention:
    """Depth weights of every site of a rewritten model on ``example_inputs``.

    The first call for a kind of inputs traces the model. What that gives is kept with the model, so that later calls
    cost little more than an eager forward, whatever the weights are by then: a training loop can call it now and then.
    A hook that is added to a module afterwards is not seen, as it is not by the compiled model itself, until
    ``torch._dynamo.reset()``.

    Args:
        model: A rewritten ``nn.Module``; runs once, without gradients, in the mode that it is in.
        example_inputs: As for :func:`attnres_rewrite.rewrite`.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
        GraphBreakError: No AttnRes site ran on these inputs.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
    """
    _, live = require_live(model, "depth_attention")[0]
    call = example_call(model, example_inputs)
    with recording() as records, as_it_was(model), without_traces(model):
        run_through(model, call.run, record_weights, keep=True)
    if not records:
        raise GraphBreakError("no AttnRes site ran on these inputs")
    return _table(list(records.values()), whole=live.state.whole)


def _table(records: Sequence[Record], *, whole: bool) -> DepthAttention:
    """The records of one call, together. If it was not one graph, each owner was traced by itself, and so are names."""

    def full(record: Record, path: str) -> str:
        # A layer without a module has a name with a space.
        return path if whole or " " in path else f"{record.stream.name}.{path}".strip(".")

    streams = {id(record.stream): record for record in records}
    number = {key: index for index, key in enumerate(streams)}
    sources, columns = _columns(records)
    token_weights = _by_token([record.weights.cpu() for record in records], columns, len(sources))
    weights = torch.full(token_weights.shape[:2], float("nan"))
    for row, record, own in zip(weights, records, columns, strict=True):
        row[own] = record.weights.flatten(1).mean(1).cpu()
    return DepthAttention(
        sites=[_named([full(record, path) for path in record.read.readers]) for record in records],
        sources=sources,
        weights=weights,
        token_weights=token_weights,
        block_of=[record.read.block for record in records],
        stream_of=[number[id(record.stream)] for record in records],
        streams=[
            DepthStream(
                record.stream.path if whole else record.stream.name,
                [[full(record, layer) for layer in layers] for layers in record.stream.layers],
            )
            for record in streams.values()
        ],
    )


def _named(readers: list[str]) -> str:
    return " + ".join(readers) or "output of the model"


def _columns(records: Sequence[Record]) -> tuple[list[str], list[list[int]]]:
    """The names of all columns, and for every site those that its sources are in."""
    complete = max(part for r in records for part in r.read.parts if part != r.read.block) + 1
    has_partial = any(record.read.block in record.read.parts for record in records)
    # Full AttnRes has no partial at all.
    names = [*(f"b_{n}" for n in range(complete)), *(["partial"] if has_partial else [])]
    return names, [[complete if part == r.read.block else part for part in r.read.parts] for r in records]


def _by_token(weights: Sequence[Tensor], columns: Sequence[list[int]], sources: int) -> Tensor:
    """``[sites, sources, tokens...]`` from ``[own sources, own tokens...]`` of every site, with NaN elsewhere."""
    dims = max(one.dim() for one in weights) - 1
    shapes = [(*(1 for _ in range(dims + 1 - one.dim())), *one.shape[1:]) for one in weights]
    table = torch.full((len(weights), sources, *map(max, zip(*shapes, strict=True))), float("nan"))
    for row, one, own, shape in zip(table, weights, columns, shapes, strict=True):
        row[:, *map(slice, shape)][own] = one.reshape(-1, *shape)
    return table
