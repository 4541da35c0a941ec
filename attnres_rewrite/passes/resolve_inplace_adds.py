"""Pass 2: in-place adds become out-of-place ones."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.graph import indices, op_name
from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.patterns import ResidualAdd
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.residual_add import is_in_place

# Operators whose result may share memory with their first argument: views, and those that can return it as it is.
_ALIASING = frozenset(
    (
        "view reshape view_as reshape_as alias squeeze unsqueeze flatten unflatten getitem select slice transpose "
        "permute t mT T swapaxes movedim chunk split unbind expand expand_as narrow detach as_strided diagonal real "
        "contiguous to float double half bfloat16 type_as dropout identity"
    ).split()
)


class ResolveInplaceAdds(Pass):
    """Make ``x += f`` the ordinary ``x' = x + f``, with later uses of ``x`` reading ``x'``.

    ::

        x ─► iadd(x, f)         x ─► add(x, f) = x'
        later: use(x)           later: use(x')

    In the graph an in-place add leaves two names for one tensor; after this pass a value has one name,
    and data flow is what the edges say. An add into a tensor that came from outside, or that is used
    later under another name (a view, or a cast that changed nothing), is left alone.
    """

    def call(self, module: GraphModule) -> int:
        """Rewrite all in-place adds that overwrite an intermediate; returns how many."""
        count, pattern = 0, ResidualAdd()
        index = indices(module.graph)
        for node in list(module.graph.nodes):
            if not is_in_place(node) or isinstance(match := pattern.match(node), Rejection):
                continue
            if _is_shared(match.left, node, index):
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


def _is_shared(value: Node, add: Node, index: dict[Node, int]) -> bool:
    """Whether something that may share memory with ``value`` is used after ``add``, under a name of its own."""
    base = value
    while op_name(base) in _ALIASING and isinstance(base.args[0], Node):
        base = base.args[0]
    if base.op in ("placeholder", "get_attr"):
        return True
    pending, seen = [base], {base}
    while pending:
        alias = pending.pop()
        for user in alias.users:
            if alias is not value and user is not add and index[user] > index[add]:
                return True
            if user is not add and op_name(user) in _ALIASING and user not in seen and index[user] < index[add]:
                seen.add(user)
                pending.append(user)
    return False


def _set_out_of_place(node: Node) -> None:
    if node.op == "call_method":
        node.target = "add"
    elif node.target is operator.iadd:
        node.target = operator.add
    else:
        node.target = torch.ops.aten.add.Tensor
