"""The plain counterpart of ``attnres_rewrite.export_onnx``, for benchmarks that compare with it."""

from __future__ import annotations

from pathlib import Path

from onnxscript import ir
from torch import Tensor
from transformers import PreTrainedModel

import attnres_rewrite
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.onnx import conversion, transformers_exporters


def export_plain(model: PreTrainedModel, inputs: dict[str, Tensor], path: Path, *, use_cache: bool) -> None:
    """Export ``model`` as ``export_onnx`` exports a rewritten one, without a rewrite and a comparison."""
    converted = transformers_exporters.export(
        model,
        Call((), inputs),
        lambda program: program,
        use_cache=use_cache,
        dynamic_shapes=None,
        opset_version=23,
        ort_fusions=None,
    )
    conversion.finish(converted, functions=True, version=attnres_rewrite.__version__)
    ir.save(converted.model, path)
