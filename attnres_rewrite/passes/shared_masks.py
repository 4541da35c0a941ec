"""Part of pass 14: what attention makes of a mask that layers share is made once, outside of them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.memory import overwritten_by
from attnres_rewrite.graph.nodes import GraphBuilder, op_name, require_tensor, value_of

_DEVICES = ("cpu", "cuda")


def share_masks(module: GraphModule) -> None:
    """Give attentions that share a mask of booleans what each makes of it: 0 where it attends, and minus infinity.

    Attention begins with this, and keeps it for the backward. Inline, the compiler sees that all layers make the same;
    a body would make and keep one, ``[..., T, T]``, at every call.
    """
    sharing: dict[tuple[Node, torch.dtype], list[Node]] = {}
    written = set[int | None]()
    for node in module.graph.nodes:
        if op_name(node) == "scaled_dot_product_attention" and (mask := _mask_of(node)) is not None:
            sharing.setdefault((mask, require_tensor(node.all_input_nodes[0]).dtype), []).append(node)
        values = map(value_of, overwritten_by(node))
        written.update(_compat.storage_of(value) for value in values if isinstance(value, torch.Tensor))
    build = GraphBuilder(module)
    for (mask, dtype), attentions in sharing.items():
        # What is written to later is another mask for some.
        if len(attentions) < 2 or _compat.storage_of(require_tensor(mask)) in written:
            continue
        with module.graph.inserting_after(mask):
            added = build.call(torch.where, mask, 0.0, float("-inf"), like=mask)
        if require_tensor(added).dtype != dtype:
            with module.graph.inserting_after(added):
                added = build.call(torch.Tensor.to, added, dtype, like=mask)
        for node in attentions:
            node.replace_input_with(mask, added)


def _mask_of(attention: Node) -> Node | None:
    """The mask of booleans that ``attention`` is given."""
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    value = value_of(mask) if isinstance(mask, Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.device.type not in _DEVICES:
        return None
    return mask  # type: ignore[return-value]
