"""Libraries that hold a model's parameters for several processes: which of them know those of the sites.

``DistributedDataParallel`` and FSDP take the parameters that there are when they wrap a model. The gradients of sites
that come later stay those of one process, and nothing in the numbers of a step tells.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attnres_rewrite import _compat
from attnres_rewrite.errors import GraphBreakError, NotRewrittenError, UnsupportedResidualError
from attnres_rewrite.forms.site_parameters import AttnResSites


def refuse_wrapped(model: nn.Module) -> None:
    """Raise :class:`UnsupportedResidualError` if a module of ``model`` was wrapped or sharded before its rewrite."""
    for name, module in model.named_modules():
        where = f"module {name or '(root)'!r} ({type(module).__name__})"
        if isinstance(module, DistributedDataParallel):
            raise UnsupportedResidualError(
                f"{where} was wrapped before the rewrite, and averages the gradients of the parameters that it found "
                "then, so not those of the sites. Rewrite first, then wrap: rewrite(model, ...), then "
                "DistributedDataParallel(model)"
            )
        if _fsdp_of(module) == 1:
            raise UnsupportedResidualError(f"{where} is FSDP1. {_FSDP1}")
        if _compat.is_managed_by_fsdp(module):
            raise UnsupportedResidualError(
                f"{where} was sharded by FSDP before the rewrite, and the sites would stay whole, each process with "
                "gradients of its own. Rewrite first, then shard: rewrite(model, ...), then fully_shard(model)"
            )


_FSDP1 = (
    "FullyShardedDataParallel makes one flat parameter of many, in which no compiler finds queries and gains. Use its "
    "successor after the rewrite: rewrite(model, ...), then torch.distributed.fsdp.fully_shard(model)"
)


def refuse_flattened(model: nn.Module) -> None:
    """Raise :class:`UnsupportedResidualError` if FSDP1 has wrapped the rewritten ``model``, which is being called."""
    if _compat.is_flattened_by_fsdp(model):
        raise UnsupportedResidualError(f"this {type(model).__name__} is wrapped in FSDP1. {_FSDP1}")


def require_known_sites(wrapper: DistributedDataParallel) -> None:
    """Raise :class:`UnsupportedResidualError` if ``wrapper``, which is running, was there before a site in it."""
    known = _compat.parameters_known_to(wrapper)
    for name, module in wrapper.module.named_modules():
        if isinstance(module, AttnResSites) and any(p.requires_grad and id(p) not in known for p in module.flat()):
            raise UnsupportedResidualError(
                f"DistributedDataParallel does not know the parameters of {name}: it was there before them, so it "
                "averages the gradients of all others. Rewrite first, then wrap: rewrite(model, ...), then "
                "DistributedDataParallel(model)"
            )


@contextlib.contextmanager
def naming_sharded_layers(model: nn.Module) -> Iterator[None]:
    """Within the context an error of a graph that breaks says so, where it breaks at layers that FSDP has sharded."""
    try:
        yield
    except (GraphBreakError, NotRewrittenError) as error:
        if (layer := _sharded_within_owner(model)) is None:
            raise
        raise GraphBreakError(
            f"module {layer!r} is sharded by FSDP on its own (fully_shard, or FullyShardedDataParallel). The hooks "
            "that gather its weights break the graph there, so that the compiler sees the layers one at a time. Either "
            "shard the rewritten model as a whole: fully_shard(model); or, to gather layer by layer, rewrite an "
            "ExportedProgram, and shard the layers of what torch.export.unflatten makes of it, as "
            "examples/fsdp_per_layer.py does"
        ) from error


def _sharded_within_owner(model: nn.Module) -> str | None:
    """Name of the first module below an owner that FSDP gathers by itself."""
    for name, owner in model.named_modules():
        if hasattr(owner, "attn_res"):
            for below, module in owner.named_modules():
                if module is not owner and _fsdp_of(module) is not None:
                    return f"{name}.{below}".strip(".")
    return None


def _fsdp_of(module: nn.Module) -> int | None:
    """Which of the two FSDPs has hooks of its own on ``module``."""
    # Nobody has sharded anything who has not imported it, which takes a while.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    if isinstance(module, fsdp.FullyShardedDataParallel):
        return 1
    return 2 if isinstance(module, fsdp.FSDPModule) else None
