"""The names of reads: which sublayer of the model reads a value of the residual stream, found from the graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch.fx import Node

from attnres_rewrite.graph.nodes import data_inputs, indices, is_inside, module_path, module_stack, normalise_path
from attnres_rewrite.patterns import reads_of
from attnres_rewrite.streams import Branch, ResidualStream


class Readers:
    """Who reads the values of one residual stream, before it is rewritten.

    A sublayer is the outermost module on the way from a read to the next add that has no add of the stream within
    itself: ``layers.3.mlp``, not ``layers.3``, where the add is, and not ``layers.3.mlp.up_proj``. A norm between the
    read and the sublayer is passed over.

    Args:
        stream: The stream, in a graph with the names of modules.
    """

    def __init__(self, stream: ResidualStream) -> None:
        self.stream = stream
        self._index = indices(stream.root.graph)
        self._adds = {module_path(add.node) for branch in stream.branches for add in branch.adds}
        self._in_branch = _leads_to_an_add(stream)
        self._has_add = functools.cache(lambda path: any(is_inside(add, path) for add in self._adds))

    def of(self, branch: Branch) -> tuple[str, ...]:
        """Paths of the modules that read the value of ``branch``; more than one only if no layer contains them.

        A read that leads to no further add, as that of the last norm, is by the module that it is in. Empty if the
        value is read by nothing but the output of the graph.
        """
        reads = [node for node in reads_of(branch.value, self.stream.values) if node.op != "output"]
        reads.sort(key=self._index.__getitem__)
        found = list(self._sublayers(reads))
        if not found:
            path = next((self._outermost(node) or module_path(node) for node in reads), "")
            return (path,) if path else ()
        paths = tuple(dict.fromkeys(path for path, _ in found))
        if len(paths) == 1:
            return paths
        # Of a parallel residual: the layer, which has both sublayers.
        shared = set.intersection(*(set(module_stack(node)) for _, node in found))
        inner = [path for path in shared if is_inside(path, self.stream.scope) and path != self.stream.scope]
        return (max(inner, key=len),) if inner else paths

    def _sublayers(self, reads: Sequence[Node]) -> Iterator[tuple[str, Node]]:
        """The first sublayer on every way from ``reads``, and the node where the way enters it."""
        pending = [node for node in reads if node in self._in_branch]
        seen = set(pending)
        while pending:
            node = pending.pop(0)
            path = self._outermost(node)
            if path is not None and not _is_norm(node, path):
                yield path, node
                continue
            fresh = [user for user in node.users if user in self._in_branch and user not in seen]
            seen.update(fresh)
            pending += fresh

    def _outermost(self, node: Node) -> str | None:
        """The outermost module that ``node`` is in and that has no add of the stream within itself."""
        return next((path for path in module_stack(node) if not self._has_add(path)), None)


def _leads_to_an_add(stream: ResidualStream) -> set[Node]:
    """The nodes that branch outputs are computed from, but for the values of the stream."""
    pending = [node for node in stream.branch_outputs if node not in stream.values]
    found = set(pending)
    while pending:
        fresh = {source for source in data_inputs(pending.pop()) if source not in found and source not in stream.values}
        found |= fresh
        pending += fresh
    return found


def _is_norm(node: Node, path: str) -> bool:
    """Whether the module at ``path``, which ``node`` is in, is a norm."""
    kinds = (kind for entry, kind in node.meta["nn_module_stack"].values() if normalise_path(entry) == path)
    # An exported program names classes, Dynamo has them.
    names = (kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2] for kind in kinds)
    return any("norm" in name.lower() for name in names)
