"""The operators in ``torch.ops.attnres``; importing this package registers them."""

import hashlib
from pathlib import Path

import torch

from attnres_rewrite.ops import attend_blocks, merge_partial
from attnres_rewrite.ops.block_attn_res import depth_weights

__all__ = ["attend_blocks", "depth_weights", "merge_partial"]

# torch.compile's caches on disk know an op by name alone; code made from another expansion must not be found.
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
torch.compiler.config.cache_key_tag += f"attnres-{hashlib.sha256(_SOURCES).hexdigest()[:16]}"
