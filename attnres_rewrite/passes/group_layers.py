"""Pass 8: which branch belongs to which layer, and which layer to which block."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

from torch.fx import GraphModule, Node

from attnres_rewrite.config import AttnResConfig, partition_layers
from attnres_rewrite.errors import BlockPartitionError
from attnres_rewrite.graph.memory import writers_of
from attnres_rewrite.graph.nodes import data_inputs, module_stack, op_name
from attnres_rewrite.graph.weights import multiply_adds
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.blocks_for_size import blocks_for_size
from attnres_rewrite.patterns.operators import is_dropout
from attnres_rewrite.streams import Branch, ResidualStream, StreamPlan

_logger = logging.getLogger(__name__)


class GroupLayers(Pass):
    """Group a stream's branches into layers and the layers into N contiguous blocks.

    A layer is what the module tree says: the child of the owner that a branch's add ran in or, where
    the adds are in the owner itself, the child that computed the branch output. Without module
    metadata, or where every sublayer is an attribute of its own, it is the period of the graph: the
    shortest sequence of sublayers that repeats.
    """

    def call(self, module: GraphModule, stream: ResidualStream, config: AttnResConfig) -> StreamPlan:
        """The plan for ``stream``; raises BlockPartitionError if the layers cannot be grouped so."""
        names = _layer_names(stream)
        layer_of = tuple(itertools.accumulate((a != b for a, b in itertools.pairwise(names)), initial=0))
        layers = tuple(name for name, _ in itertools.groupby(names))
        blocks, why = config.blocks_of(stream.owner), None
        if blocks == "auto":
            per_layer = [len(list(branches)) for _, branches in itertools.groupby(layer_of)]
            chosen = blocks_for_size(per_layer, stream.width, multiply_adds(module.graph, stream))
            blocks, why = chosen.blocks, chosen.why
            _logger.info("stream of %s: %s", stream.owner or "(root)", why)
        if blocks == "full":
            block_of = _blocks_of_sublayers(stream, 1)
        elif config.sublayers_per_block is not None:
            block_of = _blocks_of_sublayers(stream, config.sublayers_per_block)
        else:
            sizes = partition_layers(
                len(layers),
                blocks=None if config.layers_per_block is not None else blocks,
                layers_per_block=config.layers_per_block,
            )
            block_of_layer = [block for block, size in enumerate(sizes) for _ in range(size)]
            block_of = tuple(block_of_layer[layer] for layer in layer_of)
        return StreamPlan(stream, layers, layer_of, block_of, why)

    def ensures(self, module: GraphModule, result: StreamPlan, *inputs: object) -> None:
        """Blocks are contiguous, and none is empty."""
        steps = {b - a for a, b in itertools.pairwise(result.block_of)}
        if result.block_of[0] != 0 or not steps <= {0, 1}:
            raise PostconditionError(f"blocks are not contiguous: {result.block_of}")

    def summary(self, result: StreamPlan) -> str:
        """Counts for the log."""
        return f"stream {result.stream.owner!r}: {len(result.layers)} layers in {result.blocks} blocks"


def _blocks_of_sublayers(stream: ResidualStream, per_block: int) -> tuple[int, ...]:
    """The block of every branch, where a block is so many branch outputs."""
    # A value that is read again adds nothing: it is in the block of the branch output before it.
    numbers = list(itertools.accumulate((bool(b.adds) for b in stream.branches[1:]), initial=0))
    if per_block > (found := numbers[-1] + 1):
        raise BlockPartitionError(
            f"sublayers_per_block={per_block}, but the stream has only {found} branch outputs: choose at most {found}"
        )
    return tuple(number // per_block for number in numbers)


def _layer_names(stream: ResidualStream) -> list[str]:
    names = [_child(stream.scope, module_stack((branch.adds or branch.steps)[-1].node)) for branch in stream.branches]
    if len(set(names) - {None}) < 2:
        writers = writers_of(stream.root.graph)
        names = _joined(stream, [_sublayer(stream, branch, writers) for branch in stream.branches])
    filled = _fill_gaps(names) if len(set(names) - {None}) > 1 else _by_period(stream)
    return _with_what_it_scales(stream, filled)


def _with_what_it_scales(stream: ResidualStream, names: list[str]) -> list[str]:
    """A read of the stream that is merely scaled belongs to the layer before it."""
    for k, branch in enumerate(stream.branches):
        if not branch.adds:
            names[k] = names[k - 1]
    return names


def _child(scope: str, stack: tuple[str, ...]) -> str | None:
    """The outermost module of the stack that lies inside ``scope``."""
    prefix = scope + "." if scope else ""
    return next((path for path in stack if path.startswith(prefix) and path != scope), None)


def _sublayer(stream: ResidualStream, branch: Branch, writers: Mapping[Node, Sequence[Node]]) -> str | None:
    """The layer of a branch that is added in the owner itself, by the child that computed the branch output.

    Where the children are kept as a list of lists, ``layers.0.attn``, the layer is ``layers.0``.
    """
    pending = [output.node for add in branch.adds[-1:] for output in add.outputs]
    seen = set(pending)
    while pending:
        node = pending.pop(0)
        child = _child(stream.scope, module_stack(node))
        # One dropout after every sublayer says nothing of the layer.
        if child is not None and not is_dropout(node):
            inside = child.removeprefix(stream.scope + ".").split(".")
            index = next((i for i, part in enumerate(inside) if part.isdigit()), len(inside))
            return ".".join([*filter(None, [stream.scope]), *inside[: index + 1]])
        sources = (*data_inputs(node), *writers.get(node, ()))
        fresh = [n for n in sources if n not in seen and n not in stream.values]
        seen.update(fresh)
        pending.extend(fresh)
    return None


def _fill_gaps(names: Sequence[str | None]) -> list[str]:
    """An add outside every layer joins the layer before it, or the first one."""
    filled, current = [], next(name for name in names if name is not None)
    for name in names:
        current = name or current
        filled.append(current)
    return filled


def _joined(stream: ResidualStream, names: list[str | None]) -> list[str | None]:
    """``names``, but of sublayers that are attributes, ``attn0`` and ``mlp0``, that of the first in each layer."""
    in_list = any(part.isdigit() for name in names if name is not None for part in name.split("."))
    if in_list or len(set(names)) < len(names):
        return names
    period = _period(stream)
    return [names[i - i % period] for i in range(len(names))]


def _by_period(stream: ResidualStream) -> list[str]:
    period = _period(stream)
    return [f"layer {i // period}" for i in range(len(stream.branches))]


def _period(stream: ResidualStream) -> int:
    """Length of the shortest sequence of sublayers that repeats; 1, where nothing does."""
    signatures = [_signature(branch, stream.values) for branch in stream.branches]
    count = len(signatures)
    return next((p for p in range(1, count) if all(signatures[i] == signatures[i % p] for i in range(count))), 1)


def _signature(branch: Branch, values: frozenset[Node]) -> tuple[str, ...]:
    """The operators of a branch, in an order that depends on the graph's shape alone."""
    pending = [output.node for add in branch.adds for output in add.outputs]
    seen, names = set(pending), []
    while pending:
        node = pending.pop()
        names.append(op_name(node) or node.op)
        for source in data_inputs(node):
            if source not in seen and source not in values and source.op not in ("placeholder", "get_attr"):
                seen.add(source)
                pending.append(source)
    return tuple(sorted(names))
