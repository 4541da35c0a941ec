"""The errors that users can meet, each with what was found, where, and what to do next."""

from __future__ import annotations


class AttnResError(RuntimeError):
    """Base class of every error that this package raises on purpose."""


class NoResidualStreamError(AttnResError):
    """The traced graph holds no chain ``x = x + f(x)`` that runs over at least two sublayers."""


class UnsupportedResidualError(AttnResError):
    """A residual stream was found, but of a kind for which Attention Residuals are not defined.

    Post-norm, a stream gated by its input, and a model that already has AttnRes are such kinds.
    """


class GraphBreakError(AttnResError):
    """The compiler saw only a part of a residual stream, so no part of it may be rewritten."""


class NotRewrittenError(AttnResError):
    """Layers of a rewritten model were about to run with plain residuals, without being asked to."""


class BlockPartitionError(AttnResError, ValueError):
    """The layers that were found cannot be grouped into blocks as the configuration asks."""


class ExampleInputsError(AttnResError, ValueError):
    """The example inputs are missing, or the model does not run on them."""


class CheckpointError(AttnResError):
    """Weights do not belong to the model that they are loaded into: their Attention Residuals are others, or none."""


class MeshError(AttnResError, ValueError):
    """A mesh of processes does not fit the model, or has a dimension that is not known."""


class OnnxExportError(AttnResError):
    """The model could not be exported, or ONNX Runtime computes something else than PyTorch."""


class OnnxKernelError(AttnResError):
    """The kernel for ONNX Runtime could not be built, or registered for a model."""


class MissingPackageError(AttnResError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'attnres-rewrite[{extra}]'")
