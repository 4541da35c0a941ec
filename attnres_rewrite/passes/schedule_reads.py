"""Pass 11: the reads of a block share one pass over the complete blocks (arXiv:2603.15031, section 4)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph.nodes import GraphBuilder, op_name, require_tensor
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.insert_attnres import Site


class ScheduleReads(Pass):
    """Write the sites that have the same complete blocks as one ``attend_blocks`` and a ``merge_partial`` each.

    ::

        [blocks]           ► block_attn_res ► read         [blocks] ► attend_blocks ─┬────────────► merge_partial ► read
        [blocks, partial]  ► block_attn_res ► read   to                              ├─ partial ──► merge_partial ► read
        [blocks, partial'] ► block_attn_res ► read                                   └─ partial' ─► merge_partial ► read

    The site after the last block joins those of the last block, with that block for its partial.

    A site stays as it is unless the configuration says ``"two_phase"``; where a block has one read, or there is one
    block to attend over, so that nothing can be shared; where its neighbours belong to another checkpointed region,
    whose recomputation would then need what this one computed; where the sources differ in dtype, because the first
    phase would round to that of the blocks; and where values are normalised.
    """

    def call(self, module: GraphModule, sites: Sequence[Site], config: AttnResConfig) -> list[Site]:
        """Rewrite the sites of one stream in place; returns them in the same order."""
        scheduled = {site.node: site for site in sites}
        shared = config.schedule == "two_phase" and not config.value_norm
        # As calls of one graph all reads need one form, also where nothing is shared.
        always, sums = config.compile_layers == "once", _SumsOfBlocks(module)
        for group in groups(sites) if shared else ():
            shares = len(group.sites) > 1 and len(group.blocks) > 1
            if (shares or always) and _have_one_dtype(group.sites):
                scheduled.update(zip([site.node for site in group.sites], _share(module, group, sums), strict=True))
        module.graph.lint()
        module.recompile()
        return [scheduled[site.node] for site in sites]

    def ensures(self, module: GraphModule, result: list[Site], *inputs: object) -> None:
        """Every site attends over what it attended over before."""
        (sites, _) = inputs
        assert isinstance(sites, Sequence)
        for before, after in zip(sites, result, strict=True):
            if tuple(sources_of(after.node)) != before.sources:
                raise PostconditionError(f"site {after.node.name} attends over {sources_of(after.node)}")

    def summary(self, result: list[Site]) -> str:
        """Counts for the log."""
        return (
            f"{sum(op_name(site.node) == 'merge_partial' for site in result)} of {len(result)} sites share their blocks"
        )


def _have_one_dtype(sites: Sequence[Site]) -> bool:
    return len({require_tensor(source).dtype for site in sites for source in site.sources}) == 1


def sources_of(site: Node) -> list[Node]:
    """The sources of a site, in either schedule.

    Raises:
        PostconditionError: The node is no site, or the phases of a site do not belong together.
    """
    if op_name(site) == "block_attn_res":
        return list(site.args[0])  # type: ignore[arg-type]
    if op_name(site) != "merge_partial":
        raise PostconditionError(f"{site.name} is not a block_attn_res node but {site.target}")
    arguments: Any = site.args
    mixed, log_sum, partial, query, gain, *settings, total = arguments[:8]
    if not {mixed.target, log_sum.target} <= {operator.getitem} or op_name(mixed.args[0]) != "attend_blocks":
        raise PostconditionError(f"{site.name} merges what no attend_blocks node computed")
    attend, read = mixed.args
    blocks, queries, gains, *shared = attend.args
    of_read = (queries[read], gains[read] if gains else None) if read < len(queries) else ()
    if log_sum.args != (attend, read + len(queries)) or of_read != (query, gain) or shared != settings:
        raise PostconditionError(f"{site.name} merges what {attend.name} computed for another read")
    sources = [*blocks, *([] if partial is None else [partial])]
    if len(arguments) > 8 and (summed := _summed(arguments[8], len(blocks))) != list(blocks):
        raise PostconditionError(f"{site.name} adds {summed}, which are not the blocks of {attend.name}")
    if total not in (1.0, len(sources)):
        raise PostconditionError(f"{site.name} multiplies a read of {len(sources)} sources by {total}")
    return sources


@dataclasses.dataclass(frozen=True)
class Group:
    """Sites that attend over the same blocks, and over at most one more source each, so that they may share them."""

    blocks: tuple[Node, ...]
    sites: list[Site]

    @property
    def region(self) -> object:
        """The checkpointed region of the sites, or None."""
        return self.sites[0].node.meta.get("ac_graph_id")


def groups(sites: Sequence[Site]) -> list[Group]:
    """The sites by their complete blocks and checkpointed region, in graph order."""
    groups: dict[object, Group] = {}
    for site in sites:
        blocks = site.sources[:-1] if site.has_partial else site.sources
        key = (blocks, site.node.meta.get("ac_graph_id"))
        groups.setdefault(key, Group(blocks, [])).sites.append(site)
    found = list(groups.values())
    # The read after the last block is the only one of all blocks. With that block in the place of a partial, it shares
    # the blocks before with the other reads of the last block.
    if [len(group.sites) > 1 for group in found[-2:]] == [True, False]:
        block, end = found[-2:]
        if end.blocks[:-1] == block.blocks and end.region == block.region:
            found[-2:] = [Group(block.blocks, [*block.sites, *end.sites])]
    return found


class _SumsOfBlocks:
    """Sums of complete blocks, for reads that take the plain stream as well: each is the one before and a block."""

    def __init__(self, module: GraphModule) -> None:
        self._build = GraphBuilder(module)
        self._made: dict[tuple[tuple[Node, ...], object], Node] = {}

    def of(self, group: Group, like: Node) -> Node:
        """The sum of the blocks of ``group``, made where the graph is being written."""
        total, *rest = group.blocks
        for count, block in enumerate(rest, 2):
            key = group.blocks[:count], group.region
            if key not in self._made:
                self._made[key] = self._build.call(torch.ops.aten.add.Tensor, total, block, like=like)
            total = self._made[key]
        return total


def _summed(node: Any, count: int) -> list[Any]:
    """What a sum of ``count`` blocks adds up; fewer if it is no such sum."""
    blocks: list[Any] = []
    while len(blocks) < count - 1 and isinstance(node, Node) and op_name(node) == "add" and len(node.args) == 2:
        node, block = node.args
        blocks.append(block)
    return [node, *reversed(blocks)]


def _share(module: GraphModule, group: Group, sums: _SumsOfBlocks) -> list[Site]:
    """Replace the sites of one group."""
    build, sites, first = GraphBuilder(module), group.sites, group.sites[0].node
    queries, gains = [site.node.args[1] for site in sites], [site.node.args[2] for site in sites]
    eps, scale = first.args[3:5]
    with module.graph.inserting_before(first):
        given = (list(group.blocks), queries, [] if gains[0] is None else gains, eps, scale)
        attend = build.call(torch.ops.attnres.attend_blocks.default, *given, like=first)
        parts = [build.call(operator.getitem, attend, i, like=first) for i in range(2 * len(sites))]
        plain = sums.of(group, first) if len(first.args) > 6 else None
    partials = [site.sources[len(group.blocks) :] for site in sites]
    return [_merged(build, site, plain, *parts[i :: len(sites)], *partials[i]) for i, site in enumerate(sites)]


def _merged(
    build: GraphBuilder, site: Site, plain: Node | None, mixed: Node, log_sum: Node, partial: Node | None = None
) -> Site:
    _, query, gain, eps, scale, is_sum, *form = site.node.args
    total = float(len(site.sources)) if is_sum else 1.0
    given = (mixed, log_sum, partial, query, gain, eps, scale, total, *((plain, *form[:2]) if form else ()))
    with build.graph.inserting_before(site.node):
        node = build.call(torch.ops.attnres.merge_partial.default, *given, like=site.node)
    site.node.replace_all_uses_with(node)
    build.graph.erase_node(site.node)
    return dataclasses.replace(site, node=node, read=node if site.read is site.node else site.read)
