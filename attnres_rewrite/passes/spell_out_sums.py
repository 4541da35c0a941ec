"""Pass 3: operators that add and do something else are written as sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite.graph.nodes import (
    GraphBuilder,
    depends_on,
    indices,
    is_float_tensor,
    op_name,
    require_tensor,
    same_shape,
    tensor_of,
)
from attnres_rewrite.passes.base import Pass, require_order

aten = torch.ops.aten

_PRODUCTS = {
    "addcmul": aten.mul.Tensor,
    "addcdiv": aten.div.Tensor,
    "addmm": aten.mm.default,
    "baddbmm": aten.bmm.default,
}
_FIRST = [[[0], [0]], [[-1], [0]]]
_REDUCTIONS = frozenset("sum mean tensordot einsum matmul mv".split())


class SpellOutSums(Pass):
    """Write every operator that adds to a tensor of its own shape as an ordinary sum.

    ::

        addcmul(x, a, b)        ► x + a * b             stack([x, f]).sum(0)           ► x + f
        addmm(x, a, b)          ► x + a @ b             tensordot(w, stack([x, y]), 1) ► w[0] * x + w[1] * y
        lerp(x, y, w)           ► (1 - w) * x + w * y   (w * stack([x, y])).sum(0)     ► w[0] * x + w[1] * y

    So the search for streams has sums and scales alone to follow. A bias that is broadcast, as a linear layer has it,
    is left as it is, and so are weights that compute from what they weigh: an attention is no sum.
    """

    def call(self, module: GraphModule) -> int:
        """Rewrite all such operators in place; returns how many there were."""
        count = 0
        writer = _Writer(module)
        for node in list(module.graph.nodes):
            if node.op not in ("call_function", "call_method") or not is_float_tensor(node):
                continue
            with module.graph.inserting_before(node):
                written = writer.written(node)
            if written is not None:
                count += 1
                node.replace_all_uses_with(written)
                writer.erase_unused(node)
        if count:
            module.recompile()
        return count

    def ensures(self, module: GraphModule, result: int) -> None:
        """The graph is still in topological order."""
        require_order(module)


class _Writer:
    """Writes one operator at a time, at the insertion point of the graph."""

    def __init__(self, module: GraphModule) -> None:
        self.graph, self.build = module.graph, GraphBuilder(module)
        self.index = indices(module.graph)

    def written(self, node: Node) -> Node | None:
        """The sum that ``node`` is, if it is one of these operators."""
        name = op_name(node)
        if name in _PRODUCTS:
            return self._product(node)
        if name == "lerp":
            return self._interpolation(node)
        weighted = _weighted_stack(node) if name in _REDUCTIONS else None
        return None if weighted is None else self._weighted_sum(node, *weighted)

    def _product(self, node: Node) -> Node | None:
        given = dict(zip(_names_of(node), node.args, strict=False)) | node.kwargs
        x, a, b = (given.get(key) for key in ("x", "a", "b"))
        if x is None:
            x, a, b = (given.get(key) for key in ("input", "tensor1", "tensor2"))
        factors = given.get("beta", 1), given.get("alpha", given.get("value", 1))
        if not all(is_float_tensor(n) for n in (x, a, b)) or not all(isinstance(n, (int, float)) for n in factors):
            return None
        if not same_shape(require_tensor(x), require_tensor(node)):
            return None
        product = self.build.call(_PRODUCTS[op_name(node)], a, b, like=node)
        return self._sum(node, [(x, factors[0]), (product, factors[1])])  # type: ignore[list-item]

    def _interpolation(self, node: Node) -> Node | None:
        given = dict(zip(("input", "end", "weight"), node.args, strict=False)) | node.kwargs
        x, y, weight = (given.get(key) for key in ("input", "end", "weight"))
        if not (is_float_tensor(x) and is_float_tensor(y) and tensor_of(weight) is not None):
            return None
        # Each by its own factor, so that one which computes from the stream is met as the gate that it is.
        rest = self.build.call(aten.rsub.Scalar, weight, 1, like=node)
        kept, taken = (self.build.call(aten.mul.Tensor, n, w, like=node) for n, w in ((x, rest), (y, weight)))
        return self._sum(node, [(kept, 1), (taken, 1)])

    def _weighted_sum(self, node: Node, stacked: Sequence[Node], weights: Node | float) -> Node | None:
        if not all(same_shape(require_tensor(n), require_tensor(node)) for n in stacked):
            return None
        if not isinstance(weights, Node):
            return self._sum(node, [(n, weights) for n in stacked])
        if require_tensor(weights).numel() != len(stacked) or self._computes_from(weights, stacked):
            return None
        vector = self.build.call(aten.reshape.default, weights, [len(stacked)], like=node)
        each = [self.build.call(aten.select.int, vector, 0, i, like=node) for i in range(len(stacked))]
        scaled = [self.build.call(aten.mul.Tensor, n, w, like=node) for n, w in zip(stacked, each, strict=True)]
        return self._sum(node, [(n, 1) for n in scaled])

    def _computes_from(self, weights: Node, stacked: Sequence[Node]) -> bool:
        earliest = min(self.index.get(n, 0) for n in stacked)
        return weights in self.index and depends_on(weights, set(stacked).__contains__, earliest, self.index)

    def _sum(self, node: Node, addends: Sequence[tuple[Node, float]]) -> Node:
        scaled = [n if factor == 1 else self.build.call(aten.mul.Tensor, n, factor, like=node) for n, factor in addends]
        add: Callable[[Node, Node], Node] = lambda left, right: self.build.call(aten.add.Tensor, left, right, like=node)  # noqa: E731
        return functools.reduce(add, scaled)

    def erase_unused(self, node: Node) -> None:
        """Erase ``node`` and what only it read."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for read in inputs:
            if not read.users and op_name(read) in ("stack", "mul", "view", "reshape", "unsqueeze"):
                self.erase_unused(read)


def _names_of(node: Node) -> tuple[str, ...]:
    """The names of the arguments of a fused sum, with ``x``, ``a`` and ``b`` for the tensors."""
    return ("x", "a", "b", "beta", "alpha") if "mm" in op_name(node) else ("x", "a", "b", "value")


def _weighted_stack(node: Node) -> tuple[Sequence[Node], Node | float] | None:
    """The tensors whose weighted sum ``node`` is, and the weights: a number, or a node of as many numbers."""
    name, args = op_name(node), node.args
    if name in ("sum", "mean"):
        return _reduced(node)
    if name == "tensordot" and len(args) >= 2 and _is_first(node.kwargs.get("dims", args[2:])):
        return _pair(args[1], 0, args[0])
    if name == "einsum":
        operands = args[1:] if len(args) != 2 or isinstance(args[1], Node) else args[1]
        return _einsum(str(args[0]).replace(" ", ""), operands)  # type: ignore[arg-type]
    if name in ("matmul", "mv") and len(args) == 2:
        return _pair(args[0], -1, args[1])
    return None


def _is_first(dims: object) -> bool:
    """Whether a tensordot of a vector contracts it with the first dimension of the other: 1, or ([0], [0])."""
    if isinstance(dims, (list, tuple)) and len(dims) == 1:
        (dims,) = dims
    return dims == 1 or (isinstance(dims, (list, tuple)) and [list(each) for each in dims] in _FIRST)


def _einsum(equation: str, operands: Sequence[object]) -> tuple[Sequence[Node], Node | float] | None:
    """``n,n...d->...d``, in either order and by whatever letters."""
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(operands) != 2:
        return None
    order = 0 if len(terms[0]) == 1 else 1
    weight, stacked = terms[order], terms[1 - order]
    if len(weight) != 1 or stacked.replace(weight, "", 1) != output or weight not in stacked:
        return None
    # Counted from the end, past an ellipsis that stands before it.
    dim = stacked.index(weight) if "." not in stacked[: stacked.index(weight)] else stacked.index(weight) - len(stacked)
    return _pair(operands[1 - order], dim, operands[order])


def _pair(stack: object, dim: int, weights: object) -> tuple[Sequence[Node], Node | float] | None:
    value = tensor_of(weights)
    if value is None or value.dim() != 1 or not isinstance(weights, Node):
        return None
    stacked = _stacked(stack, dim)
    return None if stacked is None else (stacked, weights)


def _reduced(node: Node) -> tuple[Sequence[Node], Node | float] | None:
    """A sum or mean over the new dimension of a stack, which may be multiplied by weights along that."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    if not isinstance(dim, int) or len(node.args) > 2 or set(node.kwargs) - {"dim", "input"}:
        return None
    stacked = _stacked(source, dim)
    if stacked is not None:
        return stacked, 1.0 / len(stacked) if op_name(node) == "mean" else 1.0
    if not isinstance(source, Node) or op_name(source) != "mul" or op_name(node) == "mean" or len(source.args) != 2:
        return None
    for stack, weights in (source.args, source.args[::-1]):
        stacked, value = _stacked(stack, dim), tensor_of(weights)
        if stacked is None or value is None or not isinstance(weights, Node):
            continue
        dims = require_tensor(stack).dim()
        at = dim % dims - dims
        if -at <= value.dim() and value.shape[at] == value.numel() == len(stacked):
            return stacked, weights
    return None


def _stacked(stack: object, dim: int) -> Sequence[Node] | None:
    """The tensors that ``stack`` stacks along ``dim``."""
    if not isinstance(stack, Node) or op_name(stack) != "stack" or stack.op != "call_function":
        return None
    tensors = stack.args[0] if stack.args else stack.kwargs.get("tensors")
    along = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    dims = require_tensor(stack).dim()
    if not isinstance(tensors, (list, tuple)) or not isinstance(along, int) or along % dims != dim % dims:
        return None
    return tensors if all(is_float_tensor(n) for n in tensors) else None
