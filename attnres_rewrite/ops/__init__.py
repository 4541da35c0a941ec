"""The operators in ``torch.ops.attnres``; importing this package registers them."""

from attnres_rewrite.ops import (
    attend_blocks,
    attend_blocks_lowered,
    attend_blocks_native,
    merge_partial,
    no_partial,
)
from attnres_rewrite.ops.block_attn_res import depth_weights

__all__ = [
    "attend_blocks",
    "attend_blocks_lowered",
    "attend_blocks_native",
    "depth_weights",
    "merge_partial",
    "no_partial",
]
