"""Where PyTorch's engines for several processes meet rewritten models; :mod:`planning` reckons what they cost there.

:mod:`checkpoints` compares the settings of a distributed checkpoint with those of a model before any weight is read.
:mod:`pipelining` makes the stages of a pipeline, of which :mod:`routes` says what crosses between them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnres_rewrite import _compat

if TYPE_CHECKING:
    from attnres_rewrite.distributed.model_size import ModelSize as ModelSize
    from attnres_rewrite.distributed.pipelining import build_stages as build_stages
    from attnres_rewrite.distributed.planning import Plan as Plan
    from attnres_rewrite.distributed.planning import plan as plan

_HOMES = {"ModelSize": "model_size", "Plan": "planning", "build_stages": "pipelining", "plan": "planning"}


def tell_torch() -> None:
    """Let ``torch.distributed.checkpoint`` compare settings once it is imported, which is not done for it here."""
    checkpoint = "torch.distributed.checkpoint"
    _compat.after_import(
        f"{checkpoint}.state_dict_loader", lambda module: _module("checkpoints").watch_state_dict_loader(module)
    )
    _compat.after_import(f"{checkpoint}.state_dict", lambda module: _module("checkpoints").watch_state_dict(module))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module(_HOMES[name]), name)


def _module(name: str) -> Any:
    return importlib.import_module(f"attnres_rewrite.distributed.{name}")
