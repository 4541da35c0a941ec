"""Residual connections that are recognised in order to be refused, each with its own reason."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from attnres_rewrite.graph import data_inputs, depends_on, is_float_tensor, op_name
from attnres_rewrite.patterns.base import Rejection
from attnres_rewrite.patterns.transparent import through_transparent

_NORMS = frozenset("layer_norm rms_norm native_layer_norm group_norm batch_norm rsqrt std var".split())
_MIXERS = frozenset(
    ("linear matmul bmm mm addmm einsum conv1d conv2d conv3d embedding scaled_dot_product_attention baddbmm").split()
)


TRANSFORMED = (
    "the residual stream is changed between its adds by something that is no scale, so it is not a sum of branch "
    "outputs and Attention Residuals are not defined for it"
)
POST_NORM = (
    "post-norm: a norm sits on the residual stream itself, so the stream is not a sum of branch "
    "outputs and Attention Residuals are not defined for it. Use a pre-norm variant of the model"
)


class PostNorm:
    """A norm sits on the stream itself, so there is no running sum to attend over.

    ::

        x ─┬─► sublayer ─► (+) ─► norm ─┬─► sublayer ─► (+) ─► norm ─► ...
           └────────────────┘           └────────────────┘

    Recognised from the root of one chain of adds: it is the normalised end of another chain.
    """

    name = "post-norm"

    def match(self, root: Node, ends: set[Node], index: dict[Node, int]) -> Node | Rejection:
        """The norm's last node, if ``root`` is the normalised value of one of the chain ends."""
        norm, pending, seen = None, [root], {root}
        while pending and len(seen) < 32:
            node = pending.pop()
            if node in ends:
                return norm or Rejection(TRANSFORMED, root)
            name = op_name(node)
            if name in _MIXERS:
                continue
            if name in _NORMS or (node.op == "call_module" and "norm" in str(node.target).lower()):
                norm = node
            fresh = [n for n in data_inputs(node) if n not in seen]
            seen.update(fresh)
            pending.extend(sorted(fresh, key=index.__getitem__))
        return Rejection("no other chain of adds leads here but through a sublayer", root)


class GatedStream:
    """The stream is multiplied by something that is computed from it.

    ::

        x ─┬─► gate ─► g ─► (*) ─► (+) ─► g * x + f(x)
           ├────────────────┘       │
           └─► sublayer ────────────┘

    A gate is no linear map, so it does not distribute over the sources.
    """

    name = "gated stream"

    def match(self, add: Node, index: dict[Node, int]) -> Node | Rejection:
        """The multiplication by the gate, if ``add`` adds a branch to a gated stream."""
        operands = [n for n in add.args[:2] if isinstance(n, Node)]
        for product, branch in (operands, operands[::-1]) if len(operands) == 2 else ():
            product = through_transparent(product)
            factors = [n for n in product.args[:2] if isinstance(n, Node) and is_float_tensor(n)]
            if op_name(product) != "mul" or len(factors) != 2:
                continue
            for stream, gate in (factors, factors[::-1]):
                stream = through_transparent(stream)
                if _computes_from(gate, stream, index) and _computes_from(branch, stream, index):
                    return product
        return Rejection("no operand is a gated stream", add)


def _computes_from(node: Node, value: Node, index: dict[Node, int]) -> bool:
    return node is not value and depends_on(node, lambda other: other is value, index[value], index)


def explain_refusal(
    roots: Sequence[Node], chains: Sequence[Sequence[Node]], rejected: Sequence[Node], index: dict[Node, int]
) -> Rejection | None:
    """The reason why a graph without a stream has none; ``None`` if no known one applies.

    Args:
        roots: The first value of every chain of adds.
        chains: The adds of every chain.
        rejected: The adds that are on no chain.
        index: The topological order.
    """
    gated = GatedStream()
    for add in rejected:
        if isinstance(product := gated.match(add, index), Node):
            return Rejection(
                "gated stream: the residual stream is multiplied by a gate that is computed from it, so the stream is "
                "not a sum of branch outputs and Attention Residuals are not defined for it",
                product,
            )
    ends = {chain[-1] for chain in chains}
    pattern = PostNorm()
    for root in roots:
        if root in ends:
            continue
        outcome = pattern.match(root, ends, index)
        if isinstance(outcome, Node):
            return Rejection(POST_NORM, outcome)
    return None


def explain_interruption(root: Node, ends: set[Node], index: dict[Node, int]) -> Rejection | None:
    """Why a stream that begins at ``root`` is the rest of one that ends in ``ends``; ``None`` if it is not."""
    outcome = PostNorm().match(root, ends, index)
    if isinstance(outcome, Node):
        return Rejection(POST_NORM, outcome)
    return outcome if outcome.reason == TRANSFORMED else None
