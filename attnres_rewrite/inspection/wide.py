"""Runs a captured graph in float64, whatever its dtypes are: what two graphs compute can then be compared.

In bfloat16 two ways to add the same terms differ by as much as a small term is worth. In float64 they differ by 1e-12,
and a graph that leaves a term out by much more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import tensor_of

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
# Methods that are casts; in a graph of torch functions a dtype may also be the name of one.
_CASTS = frozenset(("half", "bfloat16", "float"))


class WideInterpreter(fx.Interpreter):
    """Interprets a graph on float64 copies of its inputs, which it therefore never writes to.

    Attributes:
        narrowest: The narrowest dtype of an operator that had to run as it is, because it knows no float64 or has a
            body of its own; float64 if there was none.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.narrowest = torch.float64

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``, with float64 in the place of every narrower floating dtype."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "placeholder":
            return _private(getattr(self, n.op)(n.target, args, kwargs))
        if n.op in ("get_attr", "output"):
            return getattr(self, n.op)(n.target, args, kwargs)
        target = "double" if n.op == "call_method" and n.target in _CASTS else n.target
        if n.op == "call_module" or _compat.has_body((args, kwargs)):
            return self._as_it_is(n, args, kwargs)
        try:
            return getattr(self, n.op)(target, *_compat.map_leaves(widened, (args, kwargs)))
        except Exception:
            return self._as_it_is(n, args, kwargs)

    def _as_it_is(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        dtypes = {value.dtype for m in (n, *n.all_input_nodes) if (value := tensor_of(m)) is not None}
        narrow = [dtype for dtype in dtypes if dtype in _NARROW]
        self.narrowest = max([self.narrowest, *narrow], key=lambda dtype: torch.finfo(dtype).eps)
        given = fx.node.map_arg((n.args, n.kwargs), lambda m: _as_traced(m, self.env[m]))
        return _compat.map_tensors(widened, getattr(self, n.op)(n.target, *given))


def _as_traced(node: fx.Node, value: Any) -> Any:
    traced = tensor_of(node)
    return value.to(traced.dtype) if isinstance(value, Tensor) and traced is not None else value


def _private(value: Any) -> Any:
    """A float64 copy of an input; parameters, which a forward does not write to, are widened where they are used."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    copy = widened(value)
    return copy.clone() if copy is value else copy


def widened(value: Any) -> Any:
    """``value`` in float64 if it is a tensor of a narrower floating dtype, or float64 if it is such a dtype."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        # Apple's GPUs have no float64.
        return value.float() if value.device.type == "mps" else value.double()
    return value
