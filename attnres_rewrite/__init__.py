"""Block Attention Residuals (arXiv:2603.15031) for the transformer you already have."""

# Before anything of this package: where TORCH_LOGS names a module of it, torch imports that one when it is done itself.
import torch

from attnres_rewrite import _compat, ops
from attnres_rewrite.api import attnres_parameters, disabled, explain, rewrite, undo
from attnres_rewrite.backend import AttnResBackend, attnres_backend
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.depth import DepthAttention, depth_attention
from attnres_rewrite.errors import (
    AttnResError,
    BlockPartitionError,
    ExampleInputsError,
    GraphBreakError,
    MissingPackageError,
    NoResidualStreamError,
    NotRewrittenError,
    OnnxExportError,
    UnsupportedResidualError,
)
from attnres_rewrite.onnx import OnnxExport, export_onnx
from attnres_rewrite.report import Report
from attnres_rewrite.verification import Verification, verify

__all__ = [
    "AttnResBackend",
    "AttnResConfig",
    "AttnResError",
    "BlockPartitionError",
    "DepthAttention",
    "ExampleInputsError",
    "GraphBreakError",
    "MissingPackageError",
    "NoResidualStreamError",
    "NotRewrittenError",
    "OnnxExport",
    "OnnxExportError",
    "Report",
    "UnsupportedResidualError",
    "Verification",
    "attnres_parameters",
    "depth_attention",
    "disabled",
    "explain",
    "export_onnx",
    "rewrite",
    "undo",
    "verify",
]

__version__ = "0.1.0"

_compat.register_backend("attnres", attnres_backend)
del ops, torch
