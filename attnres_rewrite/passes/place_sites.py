"""Pass 12: a site records gradients where what reads it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Graph, GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import op_name
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.passes.insert_attnres import Site


class PlaceSites(Pass):
    """Take a site out of the part of the graph that runs without gradients, if something outside that part reads it.

    ::

        set_grad_enabled(False)            set_grad_enabled(False)
        ... f ─► block_attn_res            ... f
        set_grad_enabled(True)       to    set_grad_enabled(True)
        ... ─► read                        block_attn_res
                                           set_grad_enabled(False)
                                           set_grad_enabled(True)
                                           ... ─► read

    A site stands where the old add stood. With lower layers under ``torch.no_grad()`` that is in there, while the first
    layer that trains reads it, and so would never train its query. The site belongs to its reader.
    """

    def call(self, module: GraphModule, sites: Sequence[Site]) -> int:
        """Set the mode around the sites of one stream in place; returns around how many nodes."""
        if all(_compat.sets_grad_enabled(node) is None for node in module.graph.nodes):
            return 0
        own = {node for site in sites for node in _nodes_of(site)}
        records = dict(_modes(module.graph))
        wanted: set[Node] = set()
        for node in reversed(module.graph.nodes):
            if node in own and any(user in wanted or (user not in own and records[user]) for user in node.users):
                wanted.add(node)
        moved = [node for node in module.graph.nodes if node in wanted and not records[node]]
        for node in moved:
            with module.graph.inserting_before(node):
                _compat.set_grad_enabled(module.graph, True, like=node)
            with module.graph.inserting_after(node):
                _compat.set_grad_enabled(module.graph, False, like=node)
        _drop_idle_settings(module.graph, records[next(iter(records))])
        module.graph.lint()
        module.recompile()
        return len(moved)


def _modes(graph: Graph) -> Iterator[tuple[Node, bool]]:
    """Every node, and whether gradients are recorded where it runs."""
    first = next((mode for n in graph.nodes if (mode := _compat.sets_grad_enabled(n)) is not None), True)
    recording = not first
    for node in graph.nodes:
        mode = _compat.sets_grad_enabled(node)
        recording = recording if mode is None else mode
        yield node, recording


def _drop_idle_settings(graph: Graph, recording: bool) -> None:
    """Erase what sets the mode that is in force already, and what the next node sets anew."""
    for node in list(graph.nodes):
        mode = _compat.sets_grad_enabled(node)
        if mode is None:
            continue
        if mode == recording or _compat.sets_grad_enabled(node.next) is not None:
            graph.erase_node(node)
        else:
            recording = mode


def _nodes_of(site: Site) -> Iterator[Node]:
    """What was inserted for a site: its node, what brings that into the form of the read, and what it shares."""
    node = site.read
    while True:
        yield node
        if node is site.node:
            break
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    for part in site.node.all_input_nodes:
        if op_name(part) == "getitem" and op_name(part.all_input_nodes[0]) == "attend_blocks":
            yield part
            yield part.all_input_nodes[0]
