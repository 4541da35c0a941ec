"""Block Attention Residuals (arXiv:2603.15031) for the transformer you already have."""

# Before anything of this package: where TORCH_LOGS names a module of it, torch imports that one when it is done itself.
import torch

from attnres_rewrite import _compat, ops
from attnres_rewrite._version import __version__ as __version__
from attnres_rewrite.api import attnres_parameters, explain, rewrite, undo
from attnres_rewrite.checkpoints import from_pretrained, save_pretrained
from attnres_rewrite.compile_ahead import warm_up
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.conversion import export_state_dict, import_state_dict
from attnres_rewrite.distributed import tell_torch
from attnres_rewrite.errors import (
    AttnResError,
    BlockPartitionError,
    CheckpointError,
    ExampleInputsError,
    GraphBreakError,
    MeshError,
    MissingPackageError,
    NoResidualStreamError,
    NotRewrittenError,
    OnnxExportError,
    OnnxKernelError,
    UnsupportedResidualError,
)
from attnres_rewrite.forms.backend import AttnResBackend, attnres_backend
from attnres_rewrite.forms.live import disabled
from attnres_rewrite.huggingface import tell_libraries
from attnres_rewrite.inspection.depth import DepthAttention, depth_attention
from attnres_rewrite.inspection.dynamics import TrainingDynamics, training_dynamics
from attnres_rewrite.inspection.statistics import log_dict
from attnres_rewrite.inspection.verification import Verification, verify
from attnres_rewrite.onnx import OnnxExport, export_onnx
from attnres_rewrite.ops.decomposition_table import decompositions
from attnres_rewrite.optimizers import load_plain_optimizer_state, muon_groups, parameter_groups
from attnres_rewrite.report import Report

__all__ = [
    "AttnResBackend",
    "AttnResConfig",
    "AttnResError",
    "BlockPartitionError",
    "CheckpointError",
    "DepthAttention",
    "ExampleInputsError",
    "GraphBreakError",
    "MeshError",
    "MissingPackageError",
    "NoResidualStreamError",
    "NotRewrittenError",
    "OnnxExport",
    "OnnxExportError",
    "OnnxKernelError",
    "Report",
    "TrainingDynamics",
    "UnsupportedResidualError",
    "Verification",
    "attnres_parameters",
    "decompositions",
    "depth_attention",
    "disabled",
    "explain",
    "export_onnx",
    "export_state_dict",
    "from_pretrained",
    "import_state_dict",
    "load_plain_optimizer_state",
    "log_dict",
    "muon_groups",
    "parameter_groups",
    "rewrite",
    "save_pretrained",
    "training_dynamics",
    "undo",
    "verify",
    "warm_up",
]

_compat.register_backend("attnres", attnres_backend)
tell_libraries()
tell_torch()
del ops, torch
