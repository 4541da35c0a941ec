"""Pass 2: in-place adds become out-of-place ones."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from attnres_rewrite.graph import indices, op_name
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.patterns import ResidualAdd
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.residual_add import is_in_place

_VIEWS = frozenset("view reshape view_as alias squeeze unsqueeze".split())


class ResolveInplaceAdds(Pass):
    """Make ``x += f`` the ordinary ``x' = x + f``, with later uses of ``x`` reading ``x'``.

    ::

        x ─► iadd(x, f)         x ─► add(x, f) = x'
        later: use(x)           later: use(x')

    In the graph an in-place add leaves two names for one tensor; after this pass a value has one name,
    and data flow is what the edges say. An add into a tensor that came from outside, or that a view
    outside this chain shares, is left alone.
    """

    def call(self, module: GraphModule) -> int:
        """Rewrite all in-place adds that overwrite an intermediate; returns how many."""
        count, pattern = 0, ResidualAdd()
        index = indices(module.graph)
        for node in list(module.graph.nodes):
            if not is_in_place(node) or isinstance(match := pattern.match(node), Rejection):
                continue
            if match.left.op in ("placeholder", "get_attr") or _is_shared(match.left):
                continue
            for user in list(match.left.users):
                if index[user] > index[node]:
                    user.replace_input_with(match.left, node)
            _set_out_of_place(node)
            count += 1
        if count:
            module.recompile()
        return count

    def ensures(self, module: GraphModule, result: int) -> None:
        """The graph is still in topological order."""
        try:
            module.graph.lint()
        except RuntimeError as error:
            raise PostconditionError(str(error)) from error


def _is_shared(node: Node) -> bool:
    # A view taken before the add sees the sum as well, under another name than the ones followed here.
    return any(op_name(user) in _VIEWS for user in node.users) or op_name(node) in _VIEWS


def _set_out_of_place(node: Node) -> None:
    if node.op == "call_method":
        node.target = "add"
    elif node.target is operator.iadd:
        node.target = operator.add
    else:
        import torch

        node.target = torch.ops.aten.add.Tensor
