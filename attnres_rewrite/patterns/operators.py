"""Operators that tell what a branch is: those that make a sublayer, and those that drop out."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import op_name, submodule_of

_MIXERS = frozenset(
    (
        "linear matmul bmm mm addmm einsum conv1d conv2d conv3d embedding scaled_dot_product_attention baddbmm "
        "multi_head_attention_forward"
    ).split()
)
# The same as modules, in a graph that calls these.
_MIXING_MODULES = (nn.Linear, _compat.Convolution, nn.Embedding, nn.MultiheadAttention)


def is_mixer(node: Node) -> bool:
    """Whether ``node`` is the kind of operator that makes a sublayer: it multiplies by weights, or mixes tokens."""
    return op_name(node) in _MIXERS or isinstance(submodule_of(node), _MIXING_MODULES)


def is_convolution(node: Node) -> bool:
    """Whether ``node`` is a mixer whose channels are not the last dimension."""
    return op_name(node).startswith("conv") or isinstance(submodule_of(node), _compat.Convolution)


def is_dropout(node: Node) -> bool:
    """Whether ``node`` drops out, now or in training."""
    return op_name(node) == "dropout" or isinstance(submodule_of(node), nn.Dropout)
