"""Block Attention Residuals (arXiv:2603.15031) for the transformer you already have."""

from attnres_rewrite import _compat, op
from attnres_rewrite.api import attnres_parameters, disabled, explain, rewrite, undo
from attnres_rewrite.backend import AttnResBackend, attnres_backend
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import (
    AttnResError,
    BlockPartitionError,
    ExampleInputsError,
    GraphBreakError,
    NoResidualStreamError,
    NotRewrittenError,
    UnsupportedResidualError,
)
from attnres_rewrite.report import Report

__all__ = [
    "AttnResBackend",
    "AttnResConfig",
    "AttnResError",
    "BlockPartitionError",
    "ExampleInputsError",
    "GraphBreakError",
    "NoResidualStreamError",
    "NotRewrittenError",
    "Report",
    "UnsupportedResidualError",
    "attnres_parameters",
    "disabled",
    "explain",
    "rewrite",
    "undo",
]

__version__ = "0.1.0"

_compat.register_backend("attnres", attnres_backend)
del op
